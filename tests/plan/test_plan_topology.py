"""Names of topologies: their chips and devices, and the messages for unknown ones."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcoder.errors import ConfigError
from jaxcoder.plan.topology import GPUS, TPUS, parse_topology


@pytest.mark.parametrize(
    ("name", "chips", "devices", "chip"),
    [
        ("v4:8x8x8", 512, 512, "TPU v4"),
        ("v4-1024", 512, 512, "TPU v4"),
        ("v5p:8x8x8", 512, 512, "TPU v5p"),
        ("v5p-1024", 512, 512, "TPU v5p"),
        ("v5litepod-256", 256, 256, "TPU v5e"),
        ("v6e:16x16", 256, 256, "TPU v6e"),
        ("TPU7x:4x4x4", 64, 128, "TPU7x"),
        ("h100:64x8", 512, 512, "H100"),
        ("h200-64", 64, 64, "H200"),
        ("a100:4", 4, 4, "A100"),
    ],
)
def test_chips_are_counted_and_not_devices(name, chips, devices, chip):
    topology = parse_topology(name)
    assert (topology.chips, topology.devices, topology.chip.name) == (chips, devices, chip)


def test_slices():
    topology = parse_topology("v5e:16x16", 4)
    assert topology.chips == 1024 and str(topology) == "4 x v5e:16x16"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5p:8x8x9", "nearest are v5p:8x8x8, v5p:8x8x12"),
        ("v5e:16x17", "v5e:16x16"),
        ("v5e-300", "v5e:16x16"),
        ("v5p:3", "v5p:2x2x1"),
        ("v5", "write CHIP:SHAPE"),
        ("v9x:2x2", "there is no topology `v9x:2x2`"),
        ("h101:8x8", "did you mean `h100`?"),
        ("h100:8x3", "1, 2, 4 or 8 GPUs a node"),
        ("h100-12", "write h100:NODESxGPUS"),
        ("", "there is no topology ``"),
        ("v5p:0x2x2", "there is no topology"),
        ("h100:0x8", "there is no topology"),
    ],
)
def test_unknown_topologies_name_the_nearest(name, expected):
    with pytest.raises(ConfigError) as raised:
        parse_topology(name)
    assert expected in str(raised.value)


@pytest.mark.parametrize(("name", "slices"), [("v5p:4x4x4", 0), ("h100:8x8", 2)])
def test_invalid_slices(name, slices):
    with pytest.raises(ConfigError, match="--slices"):
        parse_topology(name, slices)


@given(st.text(alphabet="vhtpu0123456789ex:-,. ", max_size=14))
def test_any_text_is_a_topology_or_one_sentence(text):
    try:
        topology = parse_topology(text)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert topology.chips >= 1 and parse_topology(topology.name) == topology


def test_every_family_has_the_figures_of_a_plan():
    for family, generation in TPUS.items():
        for shape in generation.shapes:
            topology = parse_topology(f"{family}:{'x'.join(map(str, shape))}")
            assert topology.chips == math.prod(shape)
            assert None not in (topology.chip.memory, topology.chip.clock, topology.chip.link_bandwidth)
    for family in GPUS:
        chip = parse_topology(f"{family}:1x8").chip
        assert None not in (chip.memory, chip.link_bandwidth, chip.network_bandwidth)
