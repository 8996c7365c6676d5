"""The page in headless Chromium: what a radiologist would do, and what the browser and the server keep of it."""

import json
import os
import shutil
import subprocess
import time
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from served_page import Served, chromium, note, until

from samf.model.report_samf import Report

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'samf[web]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SECRET = "Doe^Jane"
READY = "document.querySelector('[data-stage]').dataset.ready == 'heat'"
SEEN = "document.querySelector('#report .sentences li.draft, #report [data-sentence]') != null"
NOTE = "document.querySelector('#status').innerText"
PLACE = "document.querySelector('[data-place]').innerText"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("page"))
    yield served
    assert served.close() == 0
    assert list(served.temporary.glob("samf-page-*")) == [], "the page leaves nothing when it ends"
    log = served.log.read_text()
    assert "Traceback" not in log and SECRET not in log


@pytest.fixture
def browse(tmp_path):
    """Opens browsers, and looks at the end whether they asked for anything outside, or complained."""
    opened = []

    def start(address, **options):
        downloads = tmp_path / f"downloads{len(opened)}"
        downloads.mkdir()
        browser = chromium(downloads, **options)
        opened.append((browser, address))
        browser.downloads = downloads
        browser.get(address)
        until(browser, "document.querySelector('[data-phantom]') != null")
        time.sleep(0.5)  # until gradio has connected the parts
        return browser

    yield start
    for browser, address in opened:
        host = urlsplit(address).netloc
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        outside = [url for url in asked if urlsplit(url).scheme.startswith("http") and urlsplit(url).netloc != host]
        severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        kept = browser.execute_script("return [localStorage.length, sessionStorage.length]")
        browser.quit()
        assert outside == [] and severe == [] and kept == [0, 0]


def choose(browser, *files):
    browser.find_element("css selector", "[data-input=files]").send_keys("\n".join(map(str, files)))


def phantom(browser, name="effusion"):
    browser.find_element("css selector", f"[data-phantom={name}]").click()


def shot(browser, name):
    if folder := os.environ.get("SAMF_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def downloaded(browser, kind, ending):
    button = browser.find_element("css selector", f'[data-kind="{kind}"]')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()  # not by script: without a visitor's hand browsers let one download pass
    for _ in range(240):
        time.sleep(0.25)
        found = [file for file in browser.downloads.iterdir() if file.name.endswith(ending)]
        if found:
            return found[0]
        refused = browser.execute_script("return document.querySelector('#files [data-note]').innerText")
        if refused and not refused.startswith("Writing"):
            return refused
    raise AssertionError(f"no {kind} came")


def test_a_real_scan_from_upload_to_downloads(page, browse, test_data, tmp_path):
    scan = tmp_path / f"{SECRET}.nii.gz"
    shutil.copy(test_data / "ct" / "totalseg_chest_cta_1.5mm.nii.gz", scan)
    browser, started = browse(page.address), time.monotonic()
    choose(browser, scan)
    until(browser, SEEN)
    note(f"first word seen after {time.monotonic() - started:.1f} s")
    until(browser, READY)
    note(f"evidence seen after {time.monotonic() - started:.1f} s")
    shot(browser, "real")
    source = browser.execute_script("return document.documentElement.outerHTML")
    assert SECRET not in source and "233 × 167 × 191" in source
    assert all(SECRET not in file for file in page.files())

    # Orientation: the patient's right at the left, and the crosshair follows wheel and keys.
    assert browser.execute_script("return samf.state.view.nv.opts.isRadiologicalConvention") is True
    before = browser.execute_script(f"return {PLACE}")
    canvas = browser.find_element("css selector", "#viewer canvas")
    browser.execute_script(
        "const c = arguments[0], r = c.getBoundingClientRect();"
        "c.dispatchEvent(new WheelEvent('wheel', {deltaY: 240, clientX: r.left + r.width / 2, clientY: r.top + r.height / 4,"
        "bubbles: true, cancelable: true}))",
        canvas,
    )
    until(browser, f"{PLACE} != {json.dumps(before)}", 30)
    browser.execute_script("arguments[0].focus()", canvas)
    place = browser.execute_script(f"return {PLACE}")
    canvas.send_keys("\ue00f" * 3)  # Page Down
    until(browser, f"{PLACE} != {json.dumps(place)}", 30)
    canvas.send_keys("2")
    until(browser, "document.querySelector('[data-window=mediastinum]').getAttribute('aria-pressed') == 'true'")
    assert browser.execute_script("return samf.state.view.nv.volumes[0].cal_min") == -160

    # Sentences move the crosshair to their peaks and show their frame.
    sentences = browser.find_elements("css selector", "[data-sentence]")
    for number in (len(sentences) - 2, 3):
        browser.execute_script("arguments[0].click()", sentences[number])
        until(browser, f"document.querySelector('[data-stage]').dataset.shown == '{number}'")
        frame, moved = browser.execute_script(
            "const nv = samf.state.view.nv; return [nv.volumes[1].frame4D, Array.from(nv.frac2mm(nv.scene.crosshairPos))]"
        )
        peak = browser.execute_script("return samf.state.view.peaks")[number]
        assert frame == number and all(abs(moved[k] - peak[k]) < 1.0 for k in range(3))

    ask(browser, "Is there a pleural effusion?")
    told = downloaded(browser, "json", ".json")
    report = Report.from_json(told.read_text())
    assert report.provenance.source == "scan" and len(report.sentences) == len(sentences)
    assert report.text in downloaded(browser, "txt", ".txt").read_text()
    pdf = downloaded(browser, "pdf", ".pdf")
    if shutil.which("pdftotext"):
        words = subprocess.run(["pdftotext", str(pdf), "-"], capture_output=True, text=True, check=True).stdout
        assert "not for diagnosis" in words and report.sentences[0].text[:30] in " ".join(words.split())
    nibabel = pytest.importorskip("nibabel")
    assert nibabel.load(downloaded(browser, "overlay", ".nii.gz")).shape[3] == len(sentences)
    for kind in ("sr", "dicom-pdf", "seg"):  # of a NIfTI: refused in words, where the format exists
        if browser.find_elements("css selector", f'[data-kind="{kind}"]'):
            refused = downloaded(browser, kind, ".dcm")
            assert isinstance(refused, str) and "/tmp" not in refused, refused
    browser.get("about:blank")
    assert page.none_left(), page.files()
    browser.get(page.address)


def ask(browser, question):
    field = browser.find_element("css selector", "#question textarea, #question input")
    field.send_keys(question)
    browser.execute_script("document.querySelector('#ask-button').click()")
    until(browser, "document.querySelector('.answers dd') && document.querySelector('.answers').ariaBusy == 'false'")
    assert question in browser.execute_script("return document.querySelector('.answers').innerText")


@pytest.mark.parametrize("kind", ["zip", "files"])
def test_a_dicom_series(page, browse, test_data, tmp_path, kind):
    files = sorted((test_data / "dicom" / "cip_ct-64_79sl").iterdir())
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / f"{SECRET}.zip", "w") as archive:
            for file in files:
                archive.write(file, f"{SECRET}/{file.name}")
        files = [tmp_path / f"{SECRET}.zip"]
    browser = browse(page.address)
    choose(browser, *files)
    until(browser, READY)
    assert "64 × 64 × 79" in browser.execute_script("return document.querySelector('#facts').innerText")
    pydicom = pytest.importorskip("pydicom")
    for kind in ("sr", "dicom-pdf", "seg"):
        if browser.find_elements("css selector", f'[data-kind="{kind}"]'):
            file = downloaded(browser, kind, ".dcm")
            assert not isinstance(file, str), file
            assert (
                pydicom.dcmread(file).StudyInstanceUID
                == pydicom.dcmread(sorted((test_data / "dicom" / "cip_ct-64_79sl").iterdir())[0]).StudyInstanceUID
            )
            file.unlink()


def test_bad_files_are_one_clear_sentence(page, browse, test_data, tmp_path):
    text = tmp_path / f"{SECRET}.nii.gz"
    text.write_text("Dear colleague,\n" * 50)
    browser = browse(page.address)
    choose(browser, text)
    first = until(browser, "document.querySelector('.note.failed') && document.querySelector('.note.failed').innerText")
    shot(browser, "bad")
    mr = sorted((test_data / "dicom" / "torchio_MR_labelled_CT_17sl_rot180").iterdir())
    browser.execute_script("document.querySelector('.note.failed').remove()")
    choose(browser, *mr)
    second = until(
        browser, "document.querySelector('.note.failed') && document.querySelector('.note.failed').innerText"
    )
    note(f"{first} | {second}")
    for message in (first, second):
        assert "\n" not in message and "/tmp" not in message and SECRET not in message and "Traceback" not in message
    assert page.none_left(), page.files()


def test_two_visitors_at_once_see_their_own_scans(page, browse):
    browsers = [browse(page.address), browse(page.address, dark=True)]
    phantom(browsers[0], "effusion"), phantom(browsers[1], "emphysema")
    texts = []
    for browser in browsers:
        until(browser, READY, 600)
        texts.append(browser.execute_script("return document.querySelector('#report').innerText"))
    assert "effusion" in texts[0] and "mphysema" in texts[1] and texts[0] != texts[1]
    shot(browsers[1], "dark")


def test_stop_ends_a_report_and_the_page_goes_on(page, browse):
    browser = browse(page.address)
    phantom(browser, "consolidation")
    until(browser, "document.documentElement.dataset.samfBusy == 'true'")
    browser.execute_script("document.querySelector('#stop').click()")
    until(browser, f"{NOTE}.includes('Stopped')")
    phantom(browser, "normal")
    until(browser, READY)


def test_without_webgl_slices_stand_in(page, browse):
    browser = browse(page.address, webgl=False)
    phantom(browser)
    until(browser, "document.querySelector('[data-montage]').naturalWidth > 300")
    until(
        browser,
        "document.querySelector('[data-heat]').naturalWidth > 300 && !document.querySelector('[data-heat]').hidden",
    )
    before = browser.execute_script("return document.querySelector('[data-heat]').src")
    browser.execute_script("document.querySelector('[data-sentence=\"0\"]').click()")
    until(browser, f"document.querySelector('[data-heat]').src != {json.dumps(before)}")
    shot(browser, "flat")


def test_phone_and_keyboard(page, browse):
    browser = browse(page.address, width=390, height=844)
    shot(browser, "phone-start")
    keys = browser.switch_to.active_element
    for _ in range(8):
        keys.send_keys("\ue004")  # Tab
        keys = browser.switch_to.active_element
        if keys.get_attribute("data-phantom"):
            break
    keys.send_keys("\ue007")
    until(browser, READY)
    shot(browser, "phone")
    wide = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1], "nothing to scroll sideways"
    browser.execute_script("document.querySelector('[data-sentence=\"2\"]').focus()")
    browser.switch_to.active_element.send_keys("\ue015")  # down
    keys = browser.switch_to.active_element
    assert keys.get_attribute("data-sentence") == "3"
    keys.send_keys("\ue007")
    until(browser, "document.querySelector('[data-stage]').dataset.shown == '3'")
    shot(browser, "phone-report")


@pytest.mark.parametrize("dark", [False, True])
def test_axe_has_no_serious_finding(page, browse, dark):
    axe = os.environ.get("SAMF_AXE", "")
    if not Path(axe).is_file():
        pytest.skip("$SAMF_AXE does not name axe.min.js; tests/web/axe.sh fetches it")
    browser = browse(page.address, dark=dark)
    browser.set_script_timeout(300)

    def check():
        browser.execute_script(Path(axe).read_text())
        found = browser.execute_async_script(
            "const done = arguments[0]; axe.run(document).then((r) => done(r.violations.map("
            "(v) => [v.impact, v.id, v.nodes.map((n) => n.html.slice(0, 200))])))"
        )
        assert [each for each in found if each[0] in ("serious", "critical")] == []
        return found

    first = check()
    phantom(browser)
    until(browser, READY)
    ask(browser, "Is there a lung nodule?")
    note(f"axe: {first} {check()}")


def test_log_in_is_asked_for_and_files_need_it(tmp_path, browse):
    httpx = pytest.importorskip("httpx", reason="httpx is not installed")
    served = Served(tmp_path / "page", SAMF_AUTH="anna:correct horse")
    try:
        with httpx.Client(base_url=served.address) as client:
            assert client.post("gradio_api/upload", files={"files": b"x"}).status_code == 401
            assert client.get(f"gradio_api/file={served.temporary}/x").status_code == 401
            assert client.post("login", data={"username": "anna", "password": "wrong"}).status_code == 400
            assert client.post("login", data={"username": "anna", "password": "correct horse"}).status_code == 200
            assert client.post("gradio_api/upload", files={"files": b"x"}).status_code == 200
        command = Path(f"/proc/{served.process.pid}/cmdline")
        assert not command.exists() or b"horse" not in command.read_bytes()
    finally:
        served.close()
