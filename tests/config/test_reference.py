"""The page on every key of a config is as the schema is."""

from pathlib import Path

import pytest

from raytrain.cli import main
from raytrain.config.reference import HEAD, meanings, reference, sections
from raytrain.config.schema import dotted_keys
from raytrain.config.sections import Config

PAGE = Path(__file__).parents[2] / "docs" / "config.md"
RENEW = "sed -i '/^## Every key$/,$d' docs/config.md && raytrain show-config --reference >> docs/config.md"


def test_docs_config_md_is_as_the_schema_is():
    assert PAGE.read_text().endswith(f"{reference(Config)}\n"), f"docs/config.md is of an older schema; run: {RENEW}"


@pytest.mark.parametrize(("name", "section", "in_list"), [*sections(Config)])
def test_every_key_says_what_it_means(name, section, in_list):
    assert set(meanings(section)) == set(section.model_fields)
    assert all(meanings(section).values())


def test_the_reference_has_every_key_in_a_table():
    text = reference(Config)
    assert text.startswith(HEAD)
    for dotted in dotted_keys(Config):
        section, _, key = dotted.rpartition(".")
        _, _, table = text.partition(f"### {section or 'The top level'}\n")
        assert f"\n| `{key}` | " in table.partition("\n### ")[0], dotted


def test_the_command_line_prints_it_or_a_config_but_not_both(capsys):
    assert main(["show-config", "--reference"]) == 0
    assert capsys.readouterr().out == f"{reference(Config)}\n"
    for words in ([], ["--reference", "--cfg_file", "configs/digits.yaml"]):
        assert main(["show-config", *words]) == 2
        assert "--cfg_file YAML" in capsys.readouterr().err
