"""The page's layout and events: gradio around `Workflow`."""

from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from samf.model.report_samf import DISCLAIMER
from samf.web import markup
from samf.web.downloads import kinds
from samf.web.guard import ASSETS
from samf.web.uploads import PHANTOMS
from samf.web.workflow import MAX_QUESTION, Update, Workflow

TITLE = "SAMF: chest CT report"
_AT_ONCE = 40  # visitors whose requests are followed at once; those beyond wait unseen
_WAITING = 100
_FRAGMENT = "samf.fragment(element, props, watch)"
_EXAMPLES = ("Is there a pleural effusion?", "Is the heart enlarged?", "Is there a lung nodule?")


def page_head() -> str:
    """Return what stands in the page's head: script and style, which gradio's `css` would confine to its own container."""
    script, style = ((ASSETS / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    return f'<meta name="color-scheme" content="light dark"><style>{style}</style><script>{script}</script>'


def page_theme() -> gr.themes.Base:
    """Return a theme of the system's fonts, so that none is loaded."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    return gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=mono, radius_size="md")


def make_page(workflow: Workflow, model: str) -> gr.Blocks:
    """Return the page.

    Args:
        workflow: what it does.
        model: name of the model as visitors may see it.
    """
    with gr.Blocks(analytics_enabled=False, delete_cache=(600, 3600), title=TITLE, fill_width=True) as page:
        gr.HTML(
            apply_default_css=False,
            html_template=_asset("header.html", model=model),
            js_on_load="samf.header(element)",
            elem_id="top",
        )
        intake = gr.HTML(
            value={},
            apply_default_css=False,
            html_template=_asset(
                "intake.html", limit=f"{workflow.max_bytes / 1e6:.0f} MB", phantoms=_phantom_buttons()
            ),
            js_on_load=f"samf.intake(element, props, trigger, {workflow.max_bytes})",
            elem_id="intake",
        )
        with gr.Row(elem_id="progress"):
            status = _fragment("status", 'role="status" aria-live="polite"')
            stop = gr.Button("Stop", elem_id="stop", size="sm")
        with gr.Row(elem_id="workspace"):
            with gr.Column(scale=7, min_width=320, elem_id="left"):
                viewer = gr.HTML(
                    value={},
                    apply_default_css=False,
                    html_template=_asset("viewer.html"),
                    js_on_load="samf.viewer(element, props, watch)",
                    elem_id="viewer",
                )
                facts = _fragment("facts", "", "Scan and reading")
            with gr.Column(scale=5, min_width=320, elem_id="right"):
                report = _fragment("report", "", "Report")
                findings = _fragment("findings", "", "Findings", "probability by the model's findings head")
                question, ask, answers = _ask_part()
                files = gr.HTML(
                    value={},
                    apply_default_css=False,
                    html_template=_asset("files.html", kinds=_file_buttons()),
                    js_on_load="samf.files(element, props, trigger, watch)",
                    elem_id="files",
                )
        gr.HTML(apply_default_css=False, html_template=_asset("footer.html", disclaimer=DISCLAIMER), elem_id="foot")
        _connect(page, workflow, intake, status, stop, viewer, report, findings, facts, question, ask, answers, files)
    page.queue(max_size=_WAITING)
    return page


def _ask_part() -> tuple[gr.Textbox, gr.Button, gr.HTML]:
    """Return the box for a question, its button and the place of the answers."""
    with gr.Column(elem_id="ask"):
        gr.HTML(html_template="<h2>Ask</h2>", apply_default_css=False)
        answers = _fragment("answers", 'aria-live="polite"')
        with gr.Row():
            question = gr.Textbox(
                label="Question about this scan",
                show_label=False,
                placeholder=_EXAMPLES[0],
                max_length=MAX_QUESTION,
                elem_id="question",
                html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
                scale=5,
            )
            ask = gr.Button("Ask", elem_id="ask-button", scale=1, min_width=80)
    return question, ask, answers


def _connect(page: gr.Blocks, workflow: Workflow, *parts: Any) -> None:
    """Connect the parts of the page, in the order of `make_page`, with what they start."""
    intake, status, stop, viewer, report, findings, facts, question, ask, answers, files = parts
    shown = [status, viewer, report, findings, facts, answers, files]
    settings: dict[str, Any] = {
        "show_progress": "hidden",
        "trigger_mode": "multiple",  # by default gradio drops what is chosen right after a stop
        "concurrency_limit": _AT_ONCE,
        "concurrency_id": "visitors",
        "api_visibility": "undocumented",
    }

    def report_scan(chosen: Any, request: gr.Request) -> Iterator[list[Any]]:
        for update in workflow.report(_visitor(request), chosen):
            yield _changes(update)

    def answer(asked: Any, request: gr.Request) -> Iterator[list[Any]]:
        for update in workflow.ask(_visitor(request), asked):
            yield [*_changes(update), "" if update.answers else gr.skip()]

    def write_file(wanted: Any, request: gr.Request) -> dict[str, Any]:
        kind = wanted.get("kind") if isinstance(wanted, dict) else None
        path, reason = workflow.file(_visitor(request), kind)
        address = "" if path is None else f"gradio_api/file={path}"
        return {"ready": True, "kind": kind, "address": address, "reason": reason, "name": path.name if path else ""}

    def stopped() -> str:
        return markup.steps_html("", "Stopped.", "stopped")

    def gone(request: gr.Request) -> None:
        workflow.leave(_visitor(request))

    reading = intake.submit(report_scan, intake, shown, api_name="report", **settings)
    asking = [
        event(answer, question, [*shown, question], api_name=name, **settings)
        for event, name in ((ask.click, "ask"), (question.submit, "ask_by_key"))
    ]
    files.submit(write_file, files, files, api_name="file", **settings)
    stop.click(
        stopped,
        None,
        status,
        cancels=[reading, *asking],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    page.unload(gone)


def _changes(update: Update) -> list[Any]:
    """Return the values of the parts that change, in the order of the outputs."""
    files = None if update.files is None else {"ready": update.files}
    values = [update.status, update.viewer, update.report, update.findings, update.facts, update.answers, files]
    return [gr.skip() if value is None else value for value in values]


def _visitor(request: gr.Request) -> str:
    return str(request.session_hash)


def _asset(name: str, **values: str) -> str:
    """Return a template of the assets with its placeholders, `[[name]]`, filled in."""
    text = (ASSETS / name).read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"[[{key}]]", value if value.startswith("<") else escape(value))
    return text


def _fragment(name: str, attributes: str = "", heading: str = "", hint: str = "") -> gr.HTML:
    """Return a part of the page whose HTML comes from `markup`."""
    title = f"<h2>{heading}{f' <small>{hint}</small>' if hint else ''}</h2>" if heading else ""
    template = f'<section class="part part-{name}">{title}<div data-slot {attributes}></div></section>'
    return gr.HTML(value="", apply_default_css=False, html_template=template, js_on_load=_FRAGMENT, elem_id=name)


def _phantom_buttons() -> str:
    return "".join(
        f'<button type="button" class="choice" data-phantom="{name}">{escape(phantom.title)}</button>'
        for name, phantom in PHANTOMS.items()
    )


def _file_buttons() -> str:
    return "".join(
        f'<li><button type="button" class="choice" data-kind="{name}">{escape(title)}</button></li>'
        for name, title in kinds().items()
    )
