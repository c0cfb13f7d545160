"""Layer tables are read whole, or refused with file, line and column."""

import gzip

import numpy as np
import pytest

from planner.errors import BadInput
from planner.importers.layer_tables import read_layer_tables

TABLES = {
    "attention": "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n0,0,1,16,9.5\n16,0,0,0,20\n",
    "dense": "layer,tokens,time_us\nqkv_proj,2,50\nqkv_proj,1,40\no_proj,1,30\n",
    "per_sequence": "time_us,sequences,layer\n1000,1,lm_head\n",
}


@pytest.fixture
def folder(tmp_path):
    for name, content in TABLES.items():
        (tmp_path / f"{name}.csv").write_text(content)
    return tmp_path


def test_times_become_seconds_by_kernel_and_count(folder):
    tables = read_layer_tables(folder)
    assert tables.dense["qkv_proj"].at.tolist() == [1, 2] and tables.dense["qkv_proj"].seconds.tolist() == pytest.approx([40e-6, 50e-6])
    assert tables.per_sequence["lm_head"].seconds.tolist() == pytest.approx([1e-3])
    assert tables.attention.tolist() == [[0, 0, 1, 16], [16, 0, 0, 0]] and np.allclose(tables.attention_s, [9.5e-6, 20e-6])


def test_gzipped_tables_are_the_same(folder):
    plain = read_layer_tables(folder)
    for name, content in TABLES.items():
        (folder / f"{name}.csv").unlink()
        (folder / f"{name}.csv.gz").write_bytes(gzip.compress(content.encode()))
    assert str(read_layer_tables(folder)) == str(plain)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dense", "layer,tokens\nqkv_proj,1\n", "must have the columns layer, tokens, time_us"),
        ("dense", "layer,tokens,time_us\n", "at least one row"),
        ("dense", "layer,tokens,time_us\nqkv_proj,1,0\n", "line 2, column time_us must be a number of microseconds above 0"),
        ("dense", "layer,tokens,time_us\nqkv_proj,1,nan\n", "column time_us"),
        ("dense", "layer,tokens,time_us\nqkv_proj,1.5,3\n", "column tokens must be a whole number"),
        ("dense", "layer,tokens,time_us\nqkv_proj,1,3\nqkv_proj,1,4\n", "line 3.*there once"),
        ("dense", "layer,tokens,time_us\nqkv_proj,1\n", "line 2 must have 3 fields"),
        ("attention", TABLES["attention"] + "16,0,0,0,21\n", "line 4.*two times"),
    ],
)
def test_a_bad_table_is_refused(folder, name, content, message):
    (folder / f"{name}.csv").write_text(content)
    with pytest.raises(BadInput, match=message):
        read_layer_tables(folder)


def test_a_missing_or_damaged_table_is_refused(folder):
    (folder / "dense.csv").unlink()
    with pytest.raises(BadInput, match=r"must hold dense.csv or dense.csv.gz, it has neither"):
        read_layer_tables(folder)
    (folder / "dense.csv.gz").write_bytes(gzip.compress(b"layer,tokens,time_us\n")[:-6])
    with pytest.raises(BadInput, match="unpack"):
        read_layer_tables(folder)
