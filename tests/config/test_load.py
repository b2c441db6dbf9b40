import copy
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from configs import LEAST, WHOLE, loaded, refusal, write
from raytrain.config.load import ABSENT, Tree, config_diff, dump_config, load_config, with_overrides
from raytrain.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden"


# What a file means


def test_what_the_file_leaves_out_has_its_default(tmp_path):
    cfg = loaded(tmp_path, LEAST)
    assert (cfg.TASK, cfg.SEED, cfg.OUTPUT, cfg.EXTRA_TAG, cfg.HOOK) == (
        "pkg.module:Class",
        0,
        "output",
        "default",
        None,
    )
    assert cfg.OPTIMIZATION.GRAD_NORM_CLIP == 10 and cfg.OPTIMIZATION.OPTIMIZER == "adam_onecycle"
    assert cfg.SCALE.NUM_WORKERS is None and cfg.SCALE.USE_GPU == "auto"
    assert (cfg.CHECKPOINT.EVERY_SECONDS, cfg.LOADER.WORKERS, cfg.EVAL.EVERY, cfg.LOG.EVERY) == ("auto", 2, 1, 10)
    assert cfg.MODEL == {} and cfg.CLASS_NAMES == []


def test_an_empty_section_has_its_defaults(tmp_path):
    assert loaded(tmp_path, LEAST + "SCALE:\nMODEL:\nHOOK:\n") == loaded(tmp_path, LEAST)


def test_two_configs_share_no_default(tmp_path):
    one, other = loaded(tmp_path, LEAST), loaded(tmp_path, LEAST)
    one.MODEL["X"] = 1
    assert other.MODEL == {}


@pytest.mark.parametrize("section", json.loads((GOLDEN / "optimization_sections.json").read_text()))
def test_every_optimization_section_of_openpcdet_is_accepted(tmp_path, section):
    given = section["OPTIMIZATION"]
    path = write(tmp_path, json.dumps({"TASK": "a:B", "OPTIMIZATION": given}))
    cfg = load_config(path).to_tree()["OPTIMIZATION"]
    assert {key: cfg[key] for key in given} == given


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-3", 0.001),
        ("1E+2", 100.0),
        ("-1.5e3", -1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("010", 10),
        ("1_000", 1000),
        ("0x1F", 31),
        ("-7", -7),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("v1.0", "v1.0"),
        ("1.0.0", "1.0.0"),
        ("'1e-3'", "1e-3"),
        ("!!str 5", "5"),
        ("on", True),
        ("~", None),
        ("=", "="),
        ("1e", "1e"),
        ("-", [None]),
    ],
)
def test_scalars_mean_what_a_person_means(tmp_path, written, meant):
    value = loaded(tmp_path, LEAST + f"MODEL:\n  X:\n    {written}\n").MODEL.X
    assert value == meant and type(value) is type(meant)


def test_whole_floats_are_ints_and_ints_are_floats_where_the_schema_says_so(tmp_path):
    cfg = loaded(tmp_path, "TASK: a:B\nSEED: 1e3\nOPTIMIZATION: {BATCH_SIZE_PER_GPU: 4.0, NUM_EPOCHS: 35.0, LR: 1}\n")
    assert [type(v) for v in (cfg.SEED, cfg.OPTIMIZATION.NUM_EPOCHS, cfg.OPTIMIZATION.LR)] == [int, int, float]
    assert (cfg.SEED, cfg.OPTIMIZATION.NUM_EPOCHS) == (1000, 35)


def test_anchors_and_merge_keys_work(tmp_path):
    cfg = loaded(tmp_path, LEAST + "MODEL: {A: &a {X: 1, Y: 2}, B: {<<: *a, Y: 3}, C: *a}\n")
    assert cfg.MODEL == {"A": {"X": 1, "Y": 2}, "B": {"X": 1, "Y": 3}, "C": {"X": 1, "Y": 2}}


def test_crlf_and_a_byte_order_mark_do_no_harm(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + LEAST.replace("\n", "\r\n").encode())
    assert load_config(path).OPTIMIZATION.NUM_EPOCHS == 3


# Names of the run folder


@pytest.mark.parametrize(
    ("place", "group"),
    [
        ("tools/cfgs/kitti_models/pointpillar.yaml", "kitti_models"),
        ("configs/a/cfgs/b/c/x.yaml", "b/c"),
        ("configs/digits.yaml", ""),
        ("one/two/three/x.yaml", "two/three"),
        ("one/x.yaml", ""),
        ("x.yaml", ""),
    ],
)
def test_the_run_is_named_after_its_file(tmp_path, monkeypatch, place, group):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, LEAST, place)
    cfg = load_config(place)
    assert (Path(place).stem, group) == (cfg.TAG, cfg.EXP_GROUP_PATH)
    assert load_config(tmp_path / place) == cfg, "an absolute path gave another run folder"


def test_a_file_elsewhere_has_no_group(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert load_config(write(tmp_path, LEAST, "there/a/b/x.yaml")).EXP_GROUP_PATH == ""


def test_names_in_the_file_win(tmp_path):
    cfg = loaded(tmp_path, LEAST + "TAG: mine\nEXP_GROUP_PATH: a/b\n", "EXTRA_TAG", "7")
    assert (cfg.TAG, cfg.EXP_GROUP_PATH, cfg.EXTRA_TAG) == ("mine", "a/b", "7")


# _BASE_CONFIG_


def test_a_base_is_read_beside_the_file_that_names_it_and_overlaid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "RATES: [1, 2]\nAUG: {FLIP: x, ROT: {MIN: 0, MAX: 1}}\nROOT: data\n", "cfgs/data/kitti.yaml")
    text = "DATA_CONFIG:\n  _BASE_CONFIG_: ../data/kitti.yaml\n  RATES: [9]\n  AUG: {ROT: {MAX: 5}}\n"
    write(tmp_path, LEAST + text, "cfgs/models/x.yaml")
    cfg = load_config("cfgs/models/x.yaml")
    assert cfg.DATA_CONFIG == {"RATES": [9], "AUG": {"FLIP": "x", "ROT": {"MIN": 0, "MAX": 5}}, "ROOT": "data"}


def test_bases_of_bases_are_followed_in_any_mapping(tmp_path):
    write(tmp_path, "LR: 0.5\nWEIGHT_DECAY: 0.2\n", "deep/optim.yaml")
    write(tmp_path, LEAST + "  _BASE_CONFIG_: optim.yaml\nMODEL: {WIDTH: 1, DEPTH: 2}\n", "deep/base.yaml")
    write(tmp_path, "NAME: head\nSIZE: 1\n", "head.yaml")
    cfg = loaded(
        tmp_path,
        "_BASE_CONFIG_: deep/base.yaml\nOPTIMIZATION: {WEIGHT_DECAY: 0}\n"
        "MODEL: {WIDTH: 7, HEADS: [{_BASE_CONFIG_: head.yaml, SIZE: 2}]}\n",
    )
    optim = cfg.OPTIMIZATION
    assert (optim.LR, optim.WEIGHT_DECAY, optim.NUM_EPOCHS) == (0.5, 0, 3)
    assert cfg.MODEL == {"WIDTH": 7, "DEPTH": 2, "HEADS": [{"NAME": "head", "SIZE": 2}]}


def test_the_top_keys_of_a_base_replace_what_an_outer_base_gave(tmp_path):
    """OpenPCDet: config.update(base), then the node's own keys are merged."""
    write(tmp_path, LEAST + "MODEL: {A: {X: 1, Y: 1}, B: 1}\n", "outer.yaml")
    write(tmp_path, "A: {X: 2}\n", "inner.yaml")
    cfg = loaded(tmp_path, "_BASE_CONFIG_: outer.yaml\nMODEL: {_BASE_CONFIG_: inner.yaml, A: {Z: 3}}\n")
    assert cfg.MODEL == {"A": {"X": 2, "Z": 3}, "B": 1}


def test_a_circle_of_bases_is_named(tmp_path):
    write(tmp_path, "_BASE_CONFIG_: x.yaml\n", "b.yaml")
    message = refusal(tmp_path, LEAST + "MODEL: {_BASE_CONFIG_: b.yaml}\n")
    assert message == "b.yaml:1: _BASE_CONFIG_ goes in a circle: x.yaml -> b.yaml -> x.yaml"


def test_an_error_in_a_base_names_the_base(tmp_path):
    write(tmp_path, "\n\nLR: fast\n", "base.yaml")
    message = refusal(tmp_path, LEAST + "  _BASE_CONFIG_: base.yaml\n")
    assert message == 'base.yaml:3: OPTIMIZATION.LR is "fast", but it must be a number > 0'


PLACES = {"beside": "cfgs/models/cfgs/data.yaml", "above cfgs": "cfgs/data.yaml", "here": "here/cfgs/data.yaml"}


@pytest.mark.parametrize("there", [places for n in (1, 2, 3) for places in itertools.combinations(PLACES, n)])
def test_a_base_is_looked_for_beside_the_file_then_above_cfgs_then_here(tmp_path, monkeypatch, there):
    """OpenPCDet's bases count from tools/, which holds cfgs and is where one stands; a run may start anywhere."""
    for place in there:
        write(tmp_path, f"FOUND: {place}\n", PLACES[place])
    config = write(tmp_path, LEAST + "DATA_CONFIG: {_BASE_CONFIG_: cfgs/data.yaml}\n", "cfgs/models/x.yaml")
    (tmp_path / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    cfg = load_config(config)
    assert cfg.DATA_CONFIG["FOUND"] == there[0]
    (tmp_path / "resolved.yaml").write_text(dump_config(cfg))
    monkeypatch.chdir(tmp_path.parent)
    assert load_config(tmp_path / "resolved.yaml").DATA_CONFIG["FOUND"] == there[0]


def test_a_base_of_a_base_counts_from_above_cfgs_too(tmp_path):
    write(tmp_path, "LR: 0.5\n", "tools/cfgs/parts/optim.yaml")
    write(tmp_path, "OPTIMIZATION: {_BASE_CONFIG_: cfgs/parts/optim.yaml}\n", "tools/cfgs/data/base.yaml")
    path = write(tmp_path, LEAST + "_BASE_CONFIG_: cfgs/data/base.yaml\n", "tools/cfgs/kitti_models/x.yaml")
    assert load_config(path).OPTIMIZATION.LR == 0.5


def test_a_base_that_is_nowhere_is_told_with_all_the_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, LEAST + "MODEL: {_BASE_CONFIG_: cfgs/data.yaml}\n", "tools/cfgs/models/x.yaml")
    with pytest.raises(ConfigError) as caught:
        load_config("tools/cfgs/models/x.yaml")
    assert str(caught.value).endswith(
        "_BASE_CONFIG_ is 'cfgs/data.yaml', but tools/cfgs/models/cfgs/data.yaml: there is no such file, "
        "nor tools/cfgs/data.yaml, nor cfgs/data.yaml"
    )


# Errors

WRONG_VALUES = {
    "SEED: -1": "SEED is -1, but it must be a whole number >= 0 and <= 4294967295",
    "SEED: true": "SEED is true, but it must be a whole number >= 0 and <= 4294967295",
    "SEED: '3'": 'SEED is "3", but it must be a whole number >= 0 and <= 4294967295; remove the quotes',
    "SEED: 1.5": "SEED is 1.5, but it must be a whole number",
    "TAG: 5": "TAG is 5, but it must be text, not empty; write '5'",
    "TAG: ''": 'TAG is "", but it must be text, not empty',
    "TAG: ../up": 'TAG is "../up", but it must be a folder name below OUTPUT',
    "EXTRA_TAG: /etc": 'EXTRA_TAG is "/etc", but it must be a folder name below OUTPUT',
    "OUTPUT: [a]": 'OUTPUT is ["a"], but it must be text',
    "CLASS_NAMES: Car": 'CLASS_NAMES is "Car", but it must be a list of values, each text',
    "CLASS_NAMES: [Car, 5]": "CLASS_NAMES.1 is 5, but CLASS_NAMES must be a list of values, each text",
    "MODEL: [1]": "MODEL is [1], but it must be a mapping",
    "MODEL: {A: [1, .nan]}": "MODEL.A.1 is .nan, but a number must be finite",
    "DATA_CONFIG: {A: 1e999}": "DATA_CONFIG.A is .inf, but a number must be finite",
    "LOADER: 5": "LOADER is 5, but it must be a mapping with the keys WORKERS, PREFETCH, SHUFFLE",
    "LOADER: {WORKERS: two}": 'LOADER.WORKERS is "two", but it must be a whole number >= 0',
    "LOADER: {SHUFFLE: 1}": "LOADER.SHUFFLE is 1, but it must be true or false",
    "SCALE: {USE_GPU: maybe}": 'SCALE.USE_GPU is "maybe", but it must be auto or true or false',
    "SCALE: {RESOURCES: {TPU: -1}}": "SCALE.RESOURCES.TPU is -1, but SCALE.RESOURCES must be a mapping of names to",
    "SCALE: {RESOURCES: {GPU: 1}}": 'SCALE.RESOURCES is {"GPU": 1}, but GPU is set by GPUS_PER_WORKER',
    "SCALE: {NUM_WORKERS: 4, VIRTUAL_WORKERS: 2}": "SCALE.VIRTUAL_WORKERS is 2, but NUM_WORKERS is 4; it must be at",
    "SCALE: {NUM_WORKERS: 4, MIN_WORKERS: 5}": "SCALE.MIN_WORKERS is 5, but NUM_WORKERS is 4, which is the most; it",
    "SCALE: {NUM_WORKERS: 0, MIN_WORKERS: 1}": "SCALE.MIN_WORKERS is 1, but NUM_WORKERS is 0, so the run stays in this",
    "SCALE: {MIN_WORKERS: 0}": "SCALE.MIN_WORKERS is 0, but it must be a whole number >= 1 or null",
    "SCALE: {GROW_EVERY: 0}": "SCALE.GROW_EVERY is 0, but it must be a number > 0",
    "SCALE: {THREADS: 1000000}": "SCALE.THREADS is 1000000, but it must be a whole number >= 1 and <= 1024",
    "SCALE: {VIRTUAL_WORKERS: 10000000000}": "SCALE.VIRTUAL_WORKERS is 10000000000, but it must be a whole number >= 1",
    "LOADER: {PREFETCH: 1000000}": "LOADER.PREFETCH is 1000000, but it must be a whole number >= 1 and <= 1024",
    "SCALE: {MAX_FAILURES: -2}": "SCALE.MAX_FAILURES is -2, but it must be a whole number >= -1",
    "CHECKPOINT: {EVERY_SECONDS: 0}": "CHECKPOINT.EVERY_SECONDS is 0, but it must be auto or a number > 0 or null",
    "CHECKPOINT: {MODE: best}": 'CHECKPOINT.MODE is "best", but it must be one of max, min',
    "CHECKPOINT: {KEEP_LAST: 0}": "CHECKPOINT.KEEP_LAST is 0, but it must be a whole number >= 1",
    "CHECKPOINT: {KEEP_BEST: 2}": "CHECKPOINT.KEEP_BEST is 2, but nothing says which are best; set CHECKPOINT.METRIC",
    "LOG: {EVERY: null}": "LOG.EVERY is null, but it must be a whole number >= 1",
    "HOOK: {DisableAugmentationHook: {DISABLE_AUG_LIST: []}}": "HOOK.DisableAugmentationHook.NUM_LAST_EPOCHS is",
    "  OPTIMIZER: Adam": 'OPTIMIZATION.OPTIMIZER is "Adam", but it must be one of adam, sgd, adam_onecycle',
    "  LR: 0": "OPTIMIZATION.LR is 0, but it must be a number > 0",
    "  LR: .nan": "OPTIMIZATION.LR is .nan, but it must be a number > 0",
    "  LR: -.inf": "OPTIMIZATION.LR is -.inf, but it must be a number > 0",
    "  PCT_START: 1": "OPTIMIZATION.PCT_START is 1, but it must be a number > 0 and < 1",
    "  MOMS: [0.9]": "OPTIMIZATION.MOMS is [0.9], but it must be a list of 2 values, each a number >= 0 and < 1",
    "  MOMS: [0.9, 1]": "OPTIMIZATION.MOMS.1 is 1, but OPTIMIZATION.MOMS must be a list of 2 values",
    "  GRAD_NORM_CLIP: 0": "OPTIMIZATION.GRAD_NORM_CLIP is 0, but it must be a number > 0 or null",
    "  PHASES: {FROM_EPOCH: 1}": 'OPTIMIZATION.PHASES is {"FROM_EPOCH": 1}, but it must be a list of values, each a',
    "  PHASES: [3]": "OPTIMIZATION.PHASES.0 is 3, but it must be a mapping with the keys FROM_EPOCH, LR",
    "  PHASES: [{LR: 1}]": "OPTIMIZATION.PHASES.0.FROM_EPOCH is missing; it must be a whole number >= 1",
    "  PHASES: [{FROM_EPOCH: 0, LR: 1}]": "OPTIMIZATION.PHASES.0.FROM_EPOCH is 0, but it must be a whole number >= 1",
    "  PHASES: [{FROM_EPOCH: 1, LR: null}]": "OPTIMIZATION.PHASES.0.LR is null, but it must be a number > 0",
    "  PHASES: [{FROM_EPOCH: 1}]": 'OPTIMIZATION.PHASES.0 is {"FROM_EPOCH": 1}, but it sets nothing; give it at least',
    "  PHASES: [{FROM_EPOCH: 2, LR: 1}, {FROM_EPOCH: 2, LR: 2}]": "OPTIMIZATION.PHASES is",
    "  DECAY_STEP_LIST: 3": "OPTIMIZATION.DECAY_STEP_LIST is 3, but it must be a list of values, each a whole number",
}
UNKNOWN_KEYS = {
    "OPTIMISATION: {}": "OPTIMISATION is unknown (found {}); did you mean OPTIMIZATION? Legal keys of the top level: ",
    "LR: 1": "LR is unknown (found 1); did you mean OPTIMIZATION.LR?",
    "EVERY: 1": "EVERY is unknown (found 1); did you mean EVAL.EVERY or LOG.EVERY?",
    "seed: 1": "seed is unknown (found 1); did you mean SEED?",
    "SCALE: {WORKERS: 1}": "SCALE.WORKERS is unknown (found 1); did you mean LOADER.WORKERS? Legal keys of SCALE: NUM_",
    "  LRR: 1": "OPTIMIZATION.LRR is unknown (found 1); did you mean OPTIMIZATION.LR?",
    "  PHASES: [{FROM_EPOCH: 1, lr: 1}]": "OPTIMIZATION.PHASES.0.lr is unknown (found 1); did you mean "
    "OPTIMIZATION.PHASES.0.LR? Legal keys of OPTIMIZATION.PHASES.0: FROM_EPOCH, LR, GRAD_NORM_CLIP, WEIGHT_DECAY",
    "  grad-norm-clip: 1": "OPTIMIZATION.grad-norm-clip is unknown (found 1); did you mean OPTIMIZATION.GRAD_NORM",
    "ZZZZ: 1": "ZZZZ is unknown (found 1); Legal keys of the top level: TASK, SEED",
}


@pytest.mark.parametrize(("line", "message"), [*WRONG_VALUES.items(), *UNKNOWN_KEYS.items()])
def test_a_wrong_line_is_told_its_place_what_was_found_and_what_is_legal(tmp_path, line, message):
    assert refusal(tmp_path, LEAST + line).startswith("x.yaml:5: " + message)


UNREADABLE = {
    "": "x.yaml:1: the file is empty; it must hold a mapping (`KEY: value` lines)",
    "# only a comment\n": "x.yaml:1: the file is empty",
    "- a\n- b\n": "x.yaml:1: found a list; a config must be a mapping",
    "hello": "x.yaml:1: found the single value 'hello'; a config must be a mapping",
    "A:\n\tB: 1\n": "x.yaml:2: a tab indents 'B: 1'; indent with spaces",
    "A: 1: 2\n": "x.yaml:1: not valid YAML: mapping values are not allowed here; the line reads 'A: 1: 2'",
    "A: [1, 2\nB: 3\n": "x.yaml:2: not valid YAML: while parsing a flow sequence that begins in line 1, "
    "expected ',' or ']'",
    "A: 1\n---\nB: 2\n": "x.yaml:2: not valid YAML: expected a single document in the stream",
    "A: 1\nB: *there\n": "x.yaml:2: not valid YAML: found undefined alias 'there'; the line reads 'B: *there'",
    "A: 1\nB: 2\nA: 3\n": "x.yaml:3: A stands twice (first in line 1); keep one of them",
    "MODEL:\n  VFE: {X: 1, X: 2}\n": "x.yaml:2: MODEL.VFE.X stands twice (first in line 2); keep one of them",
    "MODEL:\n  1: a\n": "x.yaml:2: MODEL: found 1 as a key; keys must be text, so write it in quotes",
    "MODEL:\n  ? [a]\n  : 1\n": "x.yaml:2: MODEL: found a collection as a key",
    "MODEL: !!python/object:os.system {}\n": "x.yaml:1: MODEL: found the YAML tag tag:yaml.org,2002:python/object:os",
    "MODEL: !mine 3\n": "x.yaml:1: MODEL: found the YAML tag !mine; a config holds text, numbers",
    "MODEL: !!int many\n": "x.yaml:1: MODEL: many cannot be read as int",
    f"MODEL: {'9' * 9999}\n": "x.yaml:1: MODEL: 999",
    "MODEL: &a [*a]\n": "x.yaml:1: MODEL.0: an alias (*name) stands inside its own anchor (&name)",
    "MODEL: &a {<<: *a}\n": "x.yaml:1: MODEL.<< must name other mappings (*alias)",
    "MODEL: {<<: 3}\n": "x.yaml:1: MODEL.<< must name other mappings (*alias)",
    "MODEL: \x07\n": "x.yaml:1: the character '\\x07' is not allowed in YAML",
    "MODEL: " + "[" * 5000: "x.yaml:1: nested too deeply to be a config",
    "MODEL: {_BASE_CONFIG_: 3}\n": "x.yaml:1: _BASE_CONFIG_ is 3; it must be the path of one YAML file, relative",
    "MODEL:\n  _BASE_CONFIG_: y.yaml\n": "x.yaml:2: _BASE_CONFIG_ is 'y.yaml', but y.yaml: there is no such file",
    "MODEL: {_BASE_CONFIG_: .}\n": "x.yaml:1: _BASE_CONFIG_ is '.', but .: there is no such file",
    "SEED: 1\n": "x.yaml:1: TASK is missing; it must be text\nx.yaml:1: OPTIMIZATION is missing; it must be a mapping",
    "TASK: digits\n": 'x.yaml:1: TASK is "digits", but it must be pkg.module:Class, for example raytrain.tasks.digits:',
}


@pytest.mark.parametrize(("text", "message"), UNREADABLE.items(), ids=lambda text: text[:30])
def test_a_file_that_is_no_config_is_refused_with_its_line(tmp_path, text, message):
    assert refusal(tmp_path, text).replace(str(tmp_path), ".").startswith(message)


def test_a_file_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"A: 1\nB: \xff\n")
    with pytest.raises(ConfigError, match=r"x\.yaml:2: found the byte 0xff; the file must be UTF-8"):
        load_config(path)


def test_a_missing_file_is_told_its_neighbour(tmp_path):
    write(tmp_path, LEAST, "digits.yaml")
    with pytest.raises(ConfigError, match=r"digit\.yaml: there is no such file; did you mean .*digits\.yaml\?"):
        load_config(tmp_path / "digit.yaml")
    with pytest.raises(ConfigError, match=r"nowhere/x\.yaml: there is no such file$"):
        load_config(tmp_path / "nowhere" / "x.yaml")


def test_everything_wrong_is_told_at_once_in_the_order_of_the_file(tmp_path):
    text = "LOG: {EVERY: 0}\nTASK: a:B\nLOADRE: {}\nSEED: x\nOPTIMIZATION: {NUM_EPOCHS: 0}\n"
    lines = refusal(tmp_path, text, "LOG.LINE_EVERY", "0").splitlines()
    assert [line.split(" is ")[0] for line in lines] == [
        "--set: LOG.LINE_EVERY",
        "x.yaml:1: LOG.EVERY",
        "x.yaml:3: LOADRE",
        "x.yaml:4: SEED",
        "x.yaml:5: OPTIMIZATION.BATCH_SIZE_PER_GPU",
        "x.yaml:5: OPTIMIZATION.NUM_EPOCHS",
    ]


# --set


@pytest.mark.parametrize(
    ("dotted", "word", "meant"),
    [
        ("OPTIMIZATION.LR", "1", 1.0),
        ("OPTIMIZATION.LR", "1e-2", 0.01),
        ("OPTIMIZATION.NUM_EPOCHS", "35.0", 35),
        ("OPTIMIZATION.USE_AMP", "true", True),
        ("OPTIMIZATION.USE_AMP", "True", True),
        ("OPTIMIZATION.MOMS", "0.9,0.8", [0.9, 0.8]),
        ("OPTIMIZATION.MOMS", "(0.9, 0.8)", [0.9, 0.8]),
        ("OPTIMIZATION.MOMS", "[0.9, 0.8]", [0.9, 0.8]),
        ("OPTIMIZATION.MOMS.1", "0", 0.0),
        ("OPTIMIZATION.BETAS", "0.9,0.999", [0.9, 0.999]),
        ("OPTIMIZATION.DECAY_STEP_LIST", "35", [35]),
        ("OPTIMIZATION.GRAD_NORM_CLIP", "null", None),
        ("OPTIMIZATION.GRAD_NORM_CLIP", "None", None),
        ("OPTIMIZATION.GRAD_NORM_CLIP", "none", None),
        ("SCALE.USE_GPU", "auto", "auto"),
        ("SCALE.USE_GPU", "false", False),
        ("SCALE.RESOURCES", "TPU:1,RACK:0.5", {"TPU": 1.0, "RACK": 0.5}),
        ("SCALE.RESOURCES.TPU", "1", 1.0),
        ("TAG", "5", "5"),
        ("TAG", "1e-3", "1e-3"),
        ("TAG", "#1", "#1"),
        ("TAG", "'5'", "5"),
        ("OUTPUT", "s3://bucket/a", "s3://bucket/a"),
        ("CLASS_NAMES", "Car,Bus", ["Car", "Bus"]),
        ("CLASS_NAMES", "Car", ["Car"]),
        ("CLASS_NAMES", "['Car']", ["Car"]),
        ("CLASS_NAMES", "1,2", ["1", "2"]),
        ("CLASS_NAMES", "[]", []),
        ("MODEL.WIDTH", "35.0", 35),
        ("MODEL.WIDTH", "0.5", 0.5),
        ("MODEL.DROPOUT", "1", 1.0),
        ("MODEL.NAME", "5", "5"),
        ("MODEL.NAME", "null", None),
        ("MODEL.VFE.USE_NORM", "false", False),
        ("MODEL.VFE.FILTERS", "64,128", [64, 128]),
        ("MODEL.VFE.FILTERS", "0.5", [0.5]),
        ("MODEL.VFE.RATES", "1,2", [1.0, 2.0]),
        ("MODEL.HEADS.1.NAME", "C", "C"),
        ("MODEL.HEADS.0.CLASSES", "Car,Bus", ["Car", "Bus"]),
        ("MODEL.NEW", "1e-3", 0.001),
        ("MODEL.NEW.DEEP", "a b", "a b"),
        ("MODEL.NEW", "{A: 1}", {"A": 1}),
        ("DATA_CONFIG.AUG", "3", 3),
        ("DATA_CONFIG.AUG.FLIP", "x", "x"),
        ("DATA_CONFIG.SIZES", "[[5, 6]]", [[5, 6]]),
        ("DATA_CONFIG.SIZES.0.1", "9", 9),
        ("TUNE.NUM_SAMPLES", "4", 4),
    ],
)
def test_set_means_what_a_person_means(tmp_path, dotted, word, meant):
    value = loaded(tmp_path, WHOLE, dotted, word).to_tree()
    for key in dotted.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    assert value == meant
    assert json.dumps(value) == json.dumps(meant), "the type differs"


def test_set_of_a_mapping_sets_the_keys_it_names(tmp_path):
    cfg = loaded(
        tmp_path, WHOLE, "MODEL.VFE", "USE_NORM:false,NAME:3", "SCALE", "{NUM_WORKERS: 2, RESOURCES: {TPU: 1}}"
    )
    assert cfg.MODEL.VFE == {"NAME": "3", "FILTERS": [64], "RATES": [0.1, 0.2], "USE_NORM": False}
    assert (cfg.SCALE.NUM_WORKERS, cfg.SCALE.RESOURCES) == (2, {"TPU": 1})


def test_set_can_switch_a_section_off(tmp_path):
    hooked = WHOLE + "HOOK: {DisableAugmentationHook: {DISABLE_AUG_LIST: [x], NUM_LAST_EPOCHS: 1}}\n"
    assert loaded(tmp_path, hooked, "HOOK", "null").HOOK is None
    assert loaded(tmp_path, hooked, "HOOK.DisableAugmentationHook.NUM_LAST_EPOCHS", "5").to_tree()["HOOK"] == {
        "DisableAugmentationHook": {"DISABLE_AUG_LIST": ["x"], "NUM_LAST_EPOCHS": 5}
    }
    assert loaded(tmp_path, WHOLE, "MODEL.VFE", "null").MODEL.VFE is None


def test_the_last_of_two_settings_wins(tmp_path):
    assert loaded(tmp_path, LEAST, "OPTIMIZATION.LR", "1", "OPTIMIZATION.LR", "2").OPTIMIZATION.LR == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["OPTIMIZATION.LR"],
            "OPTIMIZATION.LR has no value: found an odd number of words; write pairs: --set A.B value",
        ),
        (["OPTIMIZATION.LR=1", "SEED=2"], "OPTIMIZATION.LR=1: found `=`; write a space: --set OPTIMIZATION.LR 1"),
        (["A..B", "1"], "'A..B' is not a key that can be set; write it as SECTION.KEY"),
        (["MODEL._BASE_CONFIG_", "a.yaml"], "'MODEL._BASE_CONFIG_' is not a key that can be set"),
        (["OPTIMIZATION.LR", "fast"], 'OPTIMIZATION.LR is "fast", but it must be a number > 0'),
        (["OPTIMIZATION.LR", "nan"], 'OPTIMIZATION.LR is "nan", but it must be a number > 0'),
        (["OPTIMIZATION.LR", ".inf"], "OPTIMIZATION.LR is .inf, but it must be a number > 0"),
        (["OPTIMIZATION.NUM_EPOCHS", "3.5"], "OPTIMIZATION.NUM_EPOCHS is 3.5, but it must be a whole number >= 1"),
        (["OPTIMIZATION.NUM_EPOCHS", "true"], "OPTIMIZATION.NUM_EPOCHS is true, but it must be a whole number >= 1"),
        (["OPTIMIZATION.MOMS", "0.9"], "OPTIMIZATION.MOMS is 0.9, but it must be a list of 2 values"),
        (
            ["OPTIMIZATION.MOMS.2", "0.9"],
            "OPTIMIZATION.MOMS.2: OPTIMIZATION.MOMS is a list of 2; '2' is none of its ind",
        ),
        (["OPTIMIZATION.LRR", "1"], "OPTIMIZATION.LRR is unknown (found 1); did you mean OPTIMIZATION.LR?"),
        (["LR", "1"], "LR is unknown (found 1); did you mean OPTIMIZATION.LR?"),
        (["optimization.LR", "1"], 'optimization is unknown (found {"LR": 1}); did you mean OPTIMIZATION?'),
        (["OPTIMIZATION.LR.X", "1"], "OPTIMIZATION.LR.X: OPTIMIZATION.LR is 0.001, which has no keys"),
        (["MODEL.WIDTH.X", "1"], "MODEL.WIDTH.X: MODEL.WIDTH is 16, which has no keys"),
        (["MODEL.VFE", "3"], "MODEL.VFE is a mapping, but 3 was given; set one of its keys (MODEL.VFE.KEY value) or"),
        (["SCALE", "a,b"], 'SCALE is a mapping, but "a,b" was given'),
        (["MODEL.HEADS.X.NAME", "A"], "MODEL.HEADS.X.NAME: MODEL.HEADS is a list of 2; 'X' is none of its indices"),
        (["TAG", ""], 'TAG is "", but it must be text, not empty'),
        (["TASK", "null"], "TASK is null, but it must be text"),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path, words, message):
    assert refusal(tmp_path, WHOLE, *words).startswith("--set: " + message)


def test_overrides_of_a_loaded_config_work_as_on_the_file(tmp_path):
    cfg = loaded(tmp_path, WHOLE)
    words = ["OPTIMIZATION.NUM_EPOCHS", "7.0", "MODEL.VFE.NAME", "x", "MODEL.HEADS.0.NAME", "y"]
    assert with_overrides(cfg, words) == load_config(tmp_path / "x.yaml", words)
    assert cfg == loaded(tmp_path, WHOLE), "the old one changed"
    with pytest.raises(ConfigError, match=r"^--set: OPTIMIZATION\.LR is -1, but it must be a number > 0$"):
        with_overrides(cfg, ["OPTIMIZATION.LR", "-1"])


# A loaded config


def test_a_dumped_config_loads_again_to_an_equal_one(tmp_path):
    odd = {
        "A": "1e-3",
        "B": "true",
        "C": "2024-01-01",
        "D": 1e-7,
        "E": "",
        "F": "ü: #",
        "G": [[1], {"X": None}],
        "H": "010",
    }
    text = LEAST + f"MODEL: {json.dumps(odd)}\n"
    cfg = loaded(tmp_path, text, "SCALE.RESOURCES", "TPU:1", "OPTIMIZATION.BETAS", "0.9,0.99")
    dumped = dump_config(cfg)
    again = load_config(write(tmp_path, dumped, "cfgs/other/name.yaml"))
    assert again == cfg and odd == again.MODEL
    assert dump_config(again) == dumped
    assert json.loads(json.dumps(cfg.to_tree())) == cfg.to_tree()


def test_keys_are_attributes(tmp_path):
    cfg = loaded(tmp_path, WHOLE)
    assert cfg.MODEL.VFE.NAME == "PillarVFE" and cfg.MODEL.HEADS[1].CLASSES == ["Bus"]
    assert cfg.to_tree()["MODEL"] == cfg.MODEL and type(cfg.to_tree()["MODEL"]) is dict
    with pytest.raises(AttributeError, match="the config has no FILTER here; its keys are NAME, FILTERS, RATES"):
        _ = cfg.MODEL.VFE.FILTER
    assert getattr(cfg.MODEL, "ABSENT", 3) == 3
    tree = Tree(A={"B": 1})
    tree.C = {"D": [{"E": 2}]}
    assert tree.A.B == 1 and tree.C.D[0].E == 2 and tree == {"A": {"B": 1}, "C": {"D": [{"E": 2}]}}


def test_a_config_can_be_pickled_and_copied(tmp_path):
    cfg = loaded(tmp_path, WHOLE)
    for other in (pickle.loads(pickle.dumps(cfg)), copy.deepcopy(cfg)):
        assert other == cfg and type(other.MODEL.VFE) is Tree and other.MODEL.HEADS[0].NAME == "A"
        assert other.MODEL.VFE is not cfg.MODEL.VFE


def test_a_loaded_config_does_not_change(tmp_path):
    cfg = loaded(tmp_path, WHOLE)
    with pytest.raises(ValueError, match="frozen"):
        cfg.OPTIMIZATION.LR = 1.0


def test_differences_are_told_key_by_key():
    old = {"A": 1, "B": {"C": [1], "D": {"E": 1}}, "F": True, "G": 2}
    new = {"A": 1.0, "B": {"C": [2], "D": {}, "H": None}, "F": 1, "G": 2}
    assert config_diff(old, new) == [
        ("B.C", [1], [2]),
        ("B.D.E", 1, ABSENT),
        ("B.H", ABSENT, None),
        ("F", True, 1),
    ]
    assert str(ABSENT) == "absent" and config_diff(old, copy.deepcopy(old)) == []


def test_reading_a_config_imports_neither_torch_nor_ray():
    code = (
        "import sys, raytrain.config.load; print([n for n in ('torch', 'ray', 'numpy', 'pyarrow') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("entries", ["[{}]", "{{<<: [{}], B: 1}}"])
def test_aliases_that_multiply_are_refused_before_they_fill_the_memory(tmp_path, entries):
    lines = [f"  A{i}: &a{i} {entries.format(','.join([f'*a{i - 1}'] * 10))}\n" for i in range(1, 10)]
    with pytest.raises(ConfigError, match=r"more than 100,000 values; aliases .* multiply"):
        loaded(tmp_path, LEAST + "MODEL:\n  A0: &a0 {X: 1}\n" + "".join(lines))


def test_a_file_of_gigabytes_is_no_config_and_is_not_read_to_its_end(tmp_path):
    with pytest.raises(ConfigError, match="/dev/zero: larger than 4,000,000 bytes, so this is no config"):
        load_config("/dev/zero")
