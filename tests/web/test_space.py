"""The Space in web/space: what the Hub asks of its files, and what the package needs."""

import ast
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
SPACE = REPOSITORY / "web" / "space"


def test_the_app_is_one_import():
    (statement,) = ast.parse((SPACE / "app.py").read_text()).body
    assert isinstance(statement, ast.Import) and statement.names[0].name == "samf.web.hosted"


def test_the_card_names_the_app_and_a_gradio_that_the_page_takes():
    _, head, text = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(head)
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and card["license"] == "apache-2.0"
    assert (6, 31) <= tuple(map(int, card["sdk_version"].split(".")))[:2] < (7, 0)
    assert "not for diagnosis" in text


def test_its_requirements_are_the_package_s():
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.partition("#")[0].strip() for line in lines]
    assert (SPACE / "requirements.txt").read_text().split() == [line for line in wanted if line]
