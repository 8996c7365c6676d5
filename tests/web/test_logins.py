"""Log-ins of `samf serve`: what would let strangers in is refused before a model is loaded."""

import pytest
from typer.testing import CliRunner

from samf.cli.main import app
from samf.web.logins import LoginError, Logins

run = CliRunner().invoke


def test_names_and_passwords_fit_or_do_not():
    logins = Logins.parse("# staff\nanna:corr:ect\n\nbob:päss\n", "file")
    assert len(logins) == 2 and logins.allow("anna", "corr:ect") and logins.allow("bob", "päss")
    for name, password in (("anna", "wrong"), ("anna", ""), ("nobody", ""), ("nobody", "corr:ect"), ("", "")):
        assert not logins.allow(name, password)


@pytest.mark.parametrize("text", ["", "# only a comment", "anna", ":password", "anna:", "anna:x\nsecretpassword"])
def test_lines_of_another_form_are_refused_without_being_shown(text):
    with pytest.raises(LoginError, match="USER:PASSWORD") as caught:
        Logins.parse(text, "file")
    assert "secretpassword" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "without a log-in"),
        (["--host", "hospital.example"], "--auth FILE"),
        (["--auth", "no-such-file"], "USER:PASSWORD"),
        (["--max-upload", "much"], "500mb"),
        (["--evidence", "some"], "fast, full, none"),
    ],
)
def test_one_line_and_exit_code_2(arguments, words, monkeypatch):
    monkeypatch.delenv("SAMF_AUTH", raising=False)
    done = run(app, ["serve", *arguments])
    assert done.exit_code == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_log_ins_come_from_the_environment_and_exclude_no_auth(monkeypatch):
    monkeypatch.setenv("SAMF_AUTH", "anna:secret")
    done = run(app, ["serve", "--no-auth"])
    assert done.exit_code == 2 and "expected one of them" in done.stderr and "secret" not in done.stderr
