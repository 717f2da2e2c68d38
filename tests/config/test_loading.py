"""Law 9: one tree, defaults < file < environment < arguments, and every mistake one line that names its place."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.cli.config import reference_markdown
from kvtier.config import Config, GiB, load_config, parse_assignments, resolve_config
from kvtier.errors import ConfigError

ROOT = Path(__file__).parents[2]
PROFILES = sorted((ROOT / "configs").glob("*.yaml"))


def write(directory: Path, text: str) -> Path:
    path = directory / "my.yaml"
    path.write_text(text)
    return path


def refusal(path: Path | None = None, **given) -> str:
    """The one line that `load_config` refuses these with."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, **{"env": {}, **given})
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Precedence


@pytest.mark.parametrize("places", [set(some) for n in range(5) for some in itertools.combinations(range(4), n)])
def test_the_later_place_wins(places, tmp_path):
    tokens = {-1: 16, 0: 1, 1: 2, 2: 3, 3: 4}
    resolved = resolve_config(
        write(tmp_path, "pages: {page_tokens: 2}" if 1 in places else ""),
        base={"pages": {"page_tokens": 1}} if 0 in places else None,
        env={"KVTIER_PAGES__PAGE_TOKENS": "3"} if 2 in places else {},
        overrides={"pages.page_tokens": 4} if 3 in places else None,
    )
    winner = max(places, default=-1)
    assert resolved.config.pages.page_tokens == tokens[winner]
    kinds = {key: origin.kind for key, _, origin in resolved.leaves()}
    assert kinds["pages.page_tokens"] == ["base", "file", "environment", "argument", "default"][winner]
    assert {kind for key, kind in kinds.items() if key != "pages.page_tokens"} == {"default"}


def test_places_are_merged_key_by_key(tmp_path):
    config = load_config(
        write(tmp_path, "host: {format: q4}\ndisk: {path: store}"),
        env={"KVTIER_HOST__CAPACITY_BYTES": "2GiB"},
        overrides={"host.mlock": "off", "disk": {"format": "raw"}},
    )
    assert config.host is not None
    assert config.disk is not None
    assert (config.host.format, config.host.capacity_bytes, config.host.mlock) == ("q4", 2 * GiB, "off")
    assert (config.disk.path, config.disk.format) == ("store", "raw")


def test_a_section_is_switched_off_by_null_and_on_by_a_key_below_it(tmp_path):
    off = write(tmp_path, "host: null\n")
    resolved = resolve_config(off, env={})
    assert resolved.config.host is None
    assert ("host", None, "file") in [(key, value, origin.kind) for key, value, origin in resolved.leaves()]
    assert load_config(off, env={"KVTIER_HOST__FORMAT": "raw"}).host == load_config(env={}, overrides={"host.format": "raw"}).host
    assert load_config(off, env={"KVTIER_HOST__FORMAT": "raw"}, overrides={"host": None}).host is None


def test_only_variables_with_a_double_underscore_are_configuration():
    assert load_config(env={"KVTIER_NATIVE": "0", "OTHER__HOST": "x", "kvtier_a__b": "x"}) == Config()


def test_the_environment_is_the_process_s_unless_given(monkeypatch):
    monkeypatch.setenv("KVTIER_PAGES__PAGE_TOKENS", "32")
    assert load_config().pages.page_tokens == 32
    assert load_config(env={}).pages.page_tokens == 16


def test_values_from_text_are_yaml_but_text_keys_take_text_as_it_is():
    env = {
        "KVTIER_POLICY__ADAPTIVE": "false",
        "KVTIER_POLICY__BANDS": "[{above: 0, eviction_threshold: .1, time_decay_factor: 1}]",
        "KVTIER_MODEL__REVISION": "0123",
        "KVTIER_DISK__PATH": "null",
        "KVTIER_HOST__PIN": "off",
    }
    config = load_config(env=env, overrides=parse_assignments(["model.name=a: [b", "host.mlock=on", "device.place=cuda:1"]))
    assert config.disk is not None
    assert config.host is not None
    assert (config.policy.adaptive, config.policy.bands[0].eviction_threshold) == (False, 0.1)
    assert (config.model.revision, config.disk.path, config.model.name) == ("0123", "null", "a: [b")
    assert (config.host.pin, config.host.mlock, config.device.place) == ("off", "on", "cuda:1")


# Mistakes


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("host.capcity_bytes", "host.capacity_bytes"),
        ("host.capacity", "host.capacity_bytes"),
        ("hots.format", "host.format"),
        ("pages.tokens", "pages.page_tokens"),
        ("mover.page_tokens", "pages.page_tokens"),
        ("polcy", "policy"),
        ("disk.pth", "disk.path"),
        ("policy.treshold", "policy.eviction_threshold"),
    ],
)
def test_an_unknown_key_anywhere_names_the_place_the_key_and_the_nearest_one(key, nearest, tmp_path):
    end = f"unknown key {key!r}; the nearest known key is {nearest}"
    assert refusal(overrides={key: 1}) == f"argument {key}: {end}"
    variable = "KVTIER_" + key.upper().replace(".", "__")
    if "." in key:
        assert refusal(env={variable: "1"}) == f"{variable}: {end}"
    if key.count(".") < 2:
        section, dot, name = key.partition(".")
        path = write(tmp_path, f"{section}: {{{name}: 1}}" if dot else f"{section}: 1")
        if section in Config.model_fields or not dot:
            assert refusal(path) == f"{path}: {end}"
    with pytest.raises(ConfigError, match=f"nearest known key is {nearest}"):
        parse_assignments([f"{key}=1"])


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("foo", "the sections and keys are model, pages, device, host, disk, policy, mover"),
        ("model.xyzzy", "the keys of model are model.name, model.revision"),
        ("host.format.x", "host.format is a key without keys of its own"),
        ("gpu.banana", "`kvtier config show` lists all keys"),
    ],
)
def test_where_no_key_is_near_none_is_named_as_if_it_were(key, hint):
    said = refusal(overrides={key: 1})
    assert said.startswith(f"argument {key}: unknown key {key!r}; {hint}")
    assert "nearest" not in said


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("host: {capacity_byte: 1GiB}\ndisk: {path: there, format: q5}\nfoo: 1\n")
    said = refusal(file, overrides={"mover.workers": 0})
    for fault in ("unknown key 'host.capacity_byte'", "unknown key 'foo'", "disk.format is 'q5'", "mover.workers is 0"):
        assert fault in said
    assert said.count(str(file)) == 3


def test_an_unknown_key_in_a_band_is_found():
    assert refusal(overrides={"policy.bands": [{"abov": 0}]}).endswith(
        "'policy.bands[0].abov'; the nearest known key is policy.bands[].above"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pages.page_tokens": 0}, "pages.page_tokens is 0; expected a whole number (at least 1, at most 1024)"),
        ({"pages.page_tokens": True}, "pages.page_tokens is true; expected a whole number"),
        ({"pages.page_tokens": 16.0}, "pages.page_tokens is 16.0; expected a whole number"),
        ({"pages.page_tokens": 16**9999}, "pages.page_tokens is a number of more than 256 bits; expected"),
        ({"model.revision": 83}, "model.revision is 83; expected text, in quotes"),
        ({"device.place": "gpu"}, "device.place is 'gpu'; expected auto, cpu, cuda or cuda:N"),
        ({"device.place": "cuda:0\n"}, "expected auto, cpu, cuda or cuda:N"),
        ({"policy.name": "arcc"}, "policy.name is 'arcc'; expected a2cr, lru, fifo, lru-2"),
        ({"policy.cleanup_interval": float("nan")}, "policy.cleanup_interval is nan; expected a number (above 0)"),
        ({"policy.adaptive": "maybe"}, "policy.adaptive is 'maybe'; expected true or false"),
        ({"mover.clean_pressure": 1.1}, "mover.clean_pressure is 1.1; expected a number (above 0, at most 1)"),
        ({"mover.prefetch_budget_bytes": -1}, "mover.prefetch_budget_bytes is -1; a size cannot be negative"),
        ({"host": 5}, "host is 5; expected a mapping of keys or null"),
        ({"policy": None}, "policy is null; expected a mapping of keys"),
        ({"host.format": "q5"}, "unknown page format 'q5': 'q5' is no codec; did you mean 'q"),
        ({"host.format": {"k": "q4"}}, "expected the keys k and v"),
        ({"disk": {"path": "x", "format": "q4;3:q8;2-5:q8"}}, "layer 3 is named twice"),
        ({"host.format": "q8+lz4"}, "use q8 here and q8+lz4 in disk.format"),
        ({"disk.format": "q4"}, "disk.path is missing; expected a path"),
        ({"disk.path": ""}, "disk.path is ''; expected a path"),
        ({"disk.path": "a\0b"}, "a path cannot have a zero byte in it"),
        ({"disk.path": "~nobody-of-that-name/kv"}, "nobody here is called 'nobody-of-that-name'"),
        ({"policy.bands": 5}, "policy.bands is 5; expected a list of mappings with above, eviction_threshold, time_decay_factor"),
        ({"policy.bands": [5]}, "policy.bands[0] is 5; expected a mapping of keys"),
        (
            {"policy.bands": [{"above": 0, "eviction_threshold": 2, "time_decay_factor": 0}]},
            "policy.bands[0].eviction_threshold is 2; expected",
        ),
    ],
)
def test_an_impossible_value_names_key_value_and_what_is_expected(values, message):
    line = refusal(overrides=values)
    assert message in line
    assert line.startswith(f"argument {next(iter(values))}: ")


def bands(*bounds: float) -> list[dict[str, float]]:
    return [{"above": above, "eviction_threshold": 0.2, "time_decay_factor": 0.1} for above in bounds]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({f"policy.{name}_weight": 0 for name in ("attention", "frequency", "recency")}, "are all 0"),
        ({"policy.bands": bands(0, 0.5, 0.5)}, "must be ascending"),
        ({"policy.bands": bands(0.1)}, "must start with one at above: 0"),
        ({"policy.bands": []}, "must start with one at above: 0"),
        ({"policy.bands": bands(0, 0.5, 0.52)}, "hysteresis 0.05 must be smaller than the gap of bands 0.5 and 0.52"),
        ({"policy.hysteresis": 0.3}, "hysteresis 0.3 must be smaller"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(values, message):
    assert message in refusal(overrides=values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("host: [", "not usable YAML"),
        ("host: {format: q8}\nhost: {format: q4}", "the key 'host' is written twice (line 2)"),
        ("host:\n  format: q8\n  format: q4", "the key 'format' is written twice (line 3)"),
        ("- host", "expected sections such as 'host:'"),
        ("8GiB", "expected sections such as 'host:'"),
        ("a: 1\n---\nb: 1", "not usable YAML"),
        ("host: !!python/object:os.system {}", "not usable YAML"),
        ("pages: {page_tokens: !!int ''}", "not usable YAML"),
        ("[" * 5000, "not usable YAML"),
        ("? [a]\n: b", "not usable YAML"),
        ("\0", "not usable YAML"),
        ("1: 2", "unknown key '1'"),
        ("model: {name: 2024-01-01}", "model.name is datetime.date(2024, 1, 1); expected text"),
        (b"\xff\xfe\xff", "not UTF-8 text"),
        (f"pages: {{page_tokens: 0x{'f' * 6000}}}", "more than 256 bits"),
        ("&a [&b [*a, *a, *a], *b]", "expected sections"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_that_names_it(content, message, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refusal(path)
    assert line.startswith(f"{path}: ")
    assert message in line
    assert len(line) < 500


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    assert refusal(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such configuration file"
    assert refusal(tmp_path).startswith(f"{tmp_path}: cannot read")
    assert "cannot read" in refusal(Path("a\0b"))


def test_a_file_without_values_is_the_defaults(tmp_path):
    assert load_config(write(tmp_path, "# nothing yet\n"), env={}) == Config()


def test_a_value_that_is_not_yaml_names_its_variable():
    assert refusal(env={"KVTIER_POLICY__BANDS": "[{"}).startswith("KVTIER_POLICY__BANDS: not usable YAML")
    with pytest.raises(ConfigError, match=r"--set host\.format: expected KEY=VALUE"):
        parse_assignments(["host.format"])


def outcome(**given) -> Config | str:
    try:
        return load_config(**given)
    except ConfigError as error:
        return str(error)


text = st.text("aon0189.eGiB:{[]}&*!|>#,-%@\"'~ \t\n\r\0\x85\u2028\ud800é", max_size=12)
plain = st.none() | st.booleans() | st.integers() | st.floats() | text | st.sampled_from(["8GiB", "q8", "auto"])
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6)
leaves = [key for key, _, _ in resolve_config(env={}, overrides={"disk.path": "x"}).leaves()]


@given(st.dictionaries(st.sampled_from([*leaves, *Config.model_fields, "policy.bands.above", ""]), values, max_size=4))
def test_no_value_does_anything_but_load_or_one_config_error(overrides):
    result = outcome(env={}, overrides=overrides)
    if isinstance(result, str):
        assert len(result.splitlines()) == 1
    else:
        assert load_config(env={}, base=result.model_dump()) == result


@given(text, st.sampled_from(leaves))
def test_no_text_in_the_environment_does_anything_but_load_or_one_config_error(text, key):
    result = outcome(env={"KVTIER_" + key.upper().replace(".", "__"): text})
    assert isinstance(result, Config) or len(result.splitlines()) == 1


# Writing, profiles, reference


@pytest.mark.parametrize("comments", [True, False])
def test_written_yaml_loads_to_an_equal_tree(comments, tmp_path):
    for path in PROFILES:
        config = load_config(path, env={}, overrides={"model.name": "on: # é\n 1", "model.revision": "0123", "host.mlock": "on"})
        assert load_config(write(tmp_path, config.to_yaml(comments)), env={}) == config
    assert load_config(write(tmp_path, Config(host=None).to_yaml(comments)), env={}) == Config(host=None)


def test_there_are_profiles_and_each_loads():
    assert [path.stem for path in PROFILES] == ["default", "laptop", "lossless", "server", "source"]
    for path in PROFILES:
        assert load_config(path, env={}).disk is not None


def test_the_default_profile_is_the_defaults_and_a_disk():
    config = load_config(env={}, overrides={"disk.path": "./kvtier-store"})
    text = (ROOT / "configs/default.yaml").read_text()
    assert text.endswith("\n\n" + config.to_yaml(comments=True)), "write it anew: kvtier config show --yaml --set disk.path=./kvtier-store"


def test_the_source_profile_states_the_values_of_the_source():
    policy = load_config(ROOT / "configs/source.yaml", env={}).policy
    assert policy.model_dump(exclude={"name", "hysteresis"}) == Config().policy.model_dump(exclude={"name", "hysteresis"})
    assert policy.name == "a2cr-classic"


def test_the_reference_is_up_to_date_and_names_every_key():
    assert (ROOT / "docs/configuration.md").read_text() == reference_markdown(), "run `make docs`"
    assert [key for key in leaves if f"| `{key}` |" not in reference_markdown()] == []


def test_a_format_may_be_a_mapping_and_is_kept_as_its_name(tmp_path):
    given = {"k": "q8", "v": "q4", "layers": {"0-1": "q8", 29: {"k": "q6", "v": "q4"}}}
    config = load_config(env={}, overrides={"host.format": given, "disk": {"path": "x", "format": "raw+zstd"}})
    assert config.host is not None
    assert config.disk is not None
    assert (config.host.format, config.disk.format) == ("q8/q4;0-1:q8;29:q6/q4", "raw+zstd")
    path = write(tmp_path, config.to_yaml())
    assert load_config(path, env={}) == config


def test_the_tree_is_frozen_and_needs_no_tensor_library():
    with pytest.raises(ValueError, match="frozen"):
        Config().pages.page_tokens = 32
    code = "import sys, kvtier.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_variable_with_one_underscore_too_few_is_not_ignored():
    with pytest.raises(ConfigError, match=r"KVTIER_HOST_CAPACITY_BYTES: write KVTIER_HOST__CAPACITY_BYTES"):
        load_config(env={"KVTIER_HOST_CAPACITY_BYTES": "5GiB"})
