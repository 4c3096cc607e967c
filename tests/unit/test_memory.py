"""memory_analysis, memory_growth_table and the table of shapes."""

import pytest

import kvnumba
from kvnumba.commands.memory import COLUMNS
from kvnumba.commands.shapes import SHAPES
from kvnumba.formats import FORMATS

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def test_analysis_by_hand():
    got = kvnumba.memory_analysis(2, 4, 8, 3, 10, bytes_per_element=2)
    assert got == {
        "per_token_per_layer_B": 128,
        "per_layer_bytes": 3840,
        "per_layer_MB": 0.00384,
        "total_bytes": 7680,
        "total_MB": 0.00768,
        "total_GB": 7.68e-06,
        "params": {
            "num_layers": 2,
            "num_heads": 4,
            "head_dim": 8,
            "batch_size": 3,
            "seq_len": 10,
            "bytes_per_element": 2,
        },
    }


def test_analysis_agrees_with_a_cache():
    cache = kvnumba.KVCache(3, 10, 4, 8, num_layers=2, backend="numpy")
    assert kvnumba.memory_analysis(2, 4, 8, 3, 10)["total_bytes"] == cache.memory_bytes()


@pytest.mark.parametrize("name", ["num_layers", "num_heads", "head_dim", "batch_size"])
def test_analysis_refuses(name):
    arguments = {"num_layers": 1, "num_heads": 1, "head_dim": 1, "batch_size": 1, "seq_len": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name}: expected at least 1; got 0"):
        kvnumba.memory_analysis(**arguments)
    with pytest.raises(ValueError, match="bytes_per_element: expected more than 0; got 0"):
        kvnumba.memory_analysis(1, 1, 1, 1, 1, 0)


def test_the_table_counts_what_caches_take():
    table = kvnumba.memory_growth_table(2, 4, 64, 3, [100, 2000]).splitlines()
    assert table[1].split()[1:] == [*FORMATS, "int4", "model"]

    def sizes(label):
        cells = next(line for line in table if line.strip().startswith(label))[14:].split()
        return [float(n) * UNITS[unit] for n, unit in zip(cells[::2], cells[1::2], strict=True)]

    for column, (fmt, options) in enumerate(COLUMNS.values()):
        cache = kvnumba.KVCache(3, 2000, 4, 64, fmt, num_layers=2, backend="numpy", **options)
        assert sizes("2,000")[column] == pytest.approx(cache.memory_bytes(), rel=0.005)
        use = cache.memory()
        assert sizes("per token")[column] == pytest.approx(cache.bytes_per_token(), rel=0.005)
        assert sizes("its scales")[column] == pytest.approx(use.scales / 6000, rel=0.005)
        assert sizes("floats besides")[column] == pytest.approx(use.floats / 3, rel=0.005)


def test_the_defaults_are_the_seeds():
    lines = kvnumba.memory_growth_table().splitlines()
    assert lines[0] == "KV cache: 32 layers, 32 KV heads of 128, batch 1"
    assert "34.36 GB" in next(line for line in lines if line.split()[0] == "32,768")
    assert lines[6].split()[0] == "128"
    assert lines[-2].split()[0] == "65,536"


def test_shapes():
    llama = SHAPES["llama-3-8b"]
    layout = kvnumba.Layout.of(
        1, 1, llama.num_kv_heads, llama.head_dim, "float16", num_layers=llama.num_layers
    )
    assert layout.bytes_per_token() == 131072  # 128 KiB
    assert all(shape.num_qo_heads % shape.num_kv_heads == 0 for shape in SHAPES.values())


@pytest.mark.parametrize("name", ["num_layers", "num_heads", "head_dim", "batch_size"])
def test_sizes_are_checked(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1; got 0"):
        kvnumba.memory_growth_table(**{name: 0})
