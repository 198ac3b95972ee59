from __future__ import annotations

import json
from dataclasses import replace

import pytest

from stofm.nn import CellEncoderConfig, SE2TransformerConfig, StofmConfig, SubSliceConfig


@pytest.mark.parametrize("preset", [StofmConfig.base, StofmConfig.mini])
def test_json_round_trip(preset):
    config = preset(101)
    assert StofmConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_base_is_the_papers_table():
    config = StofmConfig.base(25_427)
    cells, spatial = config.cell_encoder, config.se2_transformer
    assert (cells.n_layers, cells.d_hidden, cells.n_heads, cells.d_inner) == (12, 512, 8, 1024)
    assert (cells.max_positions, config.max_tokens) == (2048, 2048)
    assert (spatial.n_layers, spatial.d_model, spatial.n_heads) == (4, 256, 8)
    assert config.subslice == SubSliceConfig.reference()


def test_departures_from_the_paper_are_off_and_may_be_left_out():
    config = StofmConfig.base(101)
    entries = config.to_dict()
    for name, off in (("values", "none"), ("pooled", False)):
        assert entries["cell_encoder"].pop(name) == off
    assert entries["se2_transformer"].pop("feature_scale") == 1
    assert entries["se2_transformer"].pop("distance_start") == "random"
    assert StofmConfig.from_dict(entries) == config


def test_distance_start_is_one_of_two():
    config = StofmConfig.base(10).se2_transformer
    with pytest.raises(ValueError, match=r"distance_start must be one of .*found 'far'"):
        replace(config, distance_start="far")


def test_feature_scale_must_be_positive():
    config = SE2TransformerConfig(d_cell=8, d_model=8, n_heads=2, d_inner=8, n_kernels=4)
    with pytest.raises(ValueError, match="feature_scale must be positive and finite, found 0"):
        replace(config, feature_scale=0)


@pytest.mark.parametrize(
    ("options", "reads"),
    [
        ({}, False),
        ({"values": "log"}, True),
        ({"pooled": True, "d_gene": 8}, True),
    ],
)
def test_what_needs_values(options, reads):
    assert CellEncoderConfig(n_tokens=9, **options).reads_values is reads


def test_newer_format_is_refused():
    entries = StofmConfig.mini(10).to_dict() | {"format_version": 99, "stofm_version": "7.0"}
    with pytest.raises(ValueError, match=r"format_version 99.*written by stofm 7.0: upgrade"):
        StofmConfig.from_dict(entries)


def test_unknown_entry_is_refused_with_the_nearest_name():
    entries = StofmConfig.mini(10).to_dict()
    entries["cell_encoder"]["n_layer"] = 3
    with pytest.raises(
        ValueError, match=r"'n_layer' in \[cell_encoder\] of config; did you mean 'n_layers'"
    ):
        StofmConfig.from_dict(entries)


def test_missing_entry_is_refused():
    entries = StofmConfig.mini(10).to_dict()
    del entries["name"]
    with pytest.raises(ValueError, match=r"Missing from config: \['name'\]"):
        StofmConfig.from_dict(entries)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CellEncoderConfig(n_tokens=9, d_hidden=10, n_heads=4), "divisible by n_heads"),
        (lambda: CellEncoderConfig(n_tokens=0), "n_tokens must be at least 1"),
        (lambda: CellEncoderConfig(n_tokens=9, d_gene=0), "d_gene must be at least 1"),
        (lambda: CellEncoderConfig(n_tokens=9, activation="tanh"), "activation must be one of"),
        (
            lambda: CellEncoderConfig(n_tokens=9, max_positions=1),
            "max_positions must be at least 2",
        ),
        (lambda: CellEncoderConfig(n_tokens=9, values="rank"), "values must be one of .*'log'"),
        (
            lambda: CellEncoderConfig(n_tokens=9, pooled=True, d_gene=7),
            "needs an even d_gene below d_cell, found 7 and 256",
        ),
        (
            lambda: CellEncoderConfig(n_tokens=9, pooled=True, d_gene=256),
            "needs an even d_gene below d_cell, found 256 and 256",
        ),
        (lambda: SE2TransformerConfig(d_model=30, n_heads=4), "found 30 and 4"),
        (
            lambda: replace(StofmConfig.mini(9), se2_transformer=SE2TransformerConfig(d_cell=3)),
            "must have one d_cell, found 576 and 3",
        ),
    ],
)
def test_bad_values_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_rules_leave_out_labels_defaults_and_first_weights():
    config = StofmConfig.mini(10)
    rules = config.rules()
    assert set(rules) == {"cell_encoder", "se2_transformer", "subslice", "max_tokens"}
    assert "dropout" not in rules["cell_encoder"]
    changed = replace(
        config,
        name="other",
        trained=True,
        se2_transformer=replace(config.se2_transformer, distance_start="random"),
    )
    assert changed.rules() == rules
    assert replace(config, max_tokens=7).rules() != rules
    deeper = replace(config.se2_transformer, n_layers=7)
    assert replace(config, se2_transformer=deeper).rules() != rules
