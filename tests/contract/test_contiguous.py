"""KVCache and QuantizedKVCache: the seed's contract, in every format."""

import numpy as np
import oracle
import pytest

import kvnumba


def test_keeps_what_is_appended(backend, fmt, normal):
    cache = kvnumba.KVCache(2, 20, 3, 8, fmt, backend=backend)
    k, v = normal(2, 3, 12, 8), normal(2, 3, 12, 8)
    cache.update(k[:, :, :7], v[:, :, :7])
    cache.update(k[:, :, 7:11], v[:, :, 7:11])
    cache.update(k[:, :, 11:], v[:, :, 11:])
    assert cache.seq_lens == [12, 12]
    for b in range(2):
        kept_k, kept_v = cache.get_kv(b)
        oracle.assert_stored(kept_k, k[b], fmt)
        oracle.assert_stored(kept_v, v[b], fmt)


def test_keys_and_values_in_different_formats(backend, normal):
    cache = kvnumba.KVCache(1, 8, 2, 8, key_format="int8", value_format="int4", backend=backend)
    k, v = normal(1, 2, 8, 8), normal(1, 2, 8, 8)
    cache.update(k, v)
    kept_k, kept_v = cache.get_kv(0)
    oracle.assert_stored(kept_k, k[0], "int8")
    oracle.assert_stored(kept_v, v[0], "int4")
    assert np.abs(kept_v - v[0]).max() > 5 * np.abs(kept_k - k[0]).max()
    assert (cache.key_format, cache.value_format) == ("int8", "int4")


def test_positions_overwrite_and_set_the_length(backend, fmt, normal):
    cache = kvnumba.KVCache(2, 16, 2, 8, fmt, backend=backend)
    k, v = normal(2, 2, 10, 8), normal(2, 2, 10, 8)
    cache.update(k, v)
    new_k, new_v = normal(2, 2, 3, 8), normal(2, 2, 3, 8)
    cache.update(new_k, new_v, [4, 10])
    assert cache.seq_lens == [7, 13]
    oracle.assert_stored(cache.get_kv(0)[0], np.concatenate((k[0, :, :4], new_k[0]), axis=1), fmt)
    oracle.assert_stored(cache.get_kv(1)[1], np.concatenate((v[1], new_v[1]), axis=1), fmt)


def test_a_gap_before_a_position_reads_as_zero(backend, fmt, normal):
    cache = kvnumba.KVCache(1, 16, 2, 8, fmt, backend=backend)
    cache.update(normal(1, 2, 1, 8), normal(1, 2, 1, 8), positions=[5])
    assert cache.seq_lens == [6]
    assert not cache.get_kv(0)[0][:, :5].any()


def test_reset_empties(backend, normal):
    cache = kvnumba.KVCache(2, 4, 1, 8, backend=backend)
    cache.update(normal(2, 1, 4, 8), normal(2, 1, 4, 8))
    cache.reset()
    assert cache.seq_lens == [0, 0]
    assert cache.get_kv(1)[0].shape == (1, 0, 8)
    k = normal(2, 1, 4, 8)
    cache.update(k, k)
    np.testing.assert_array_equal(cache.get_kv(1)[0], k[1])


def test_get_full_kv_lists_the_batch(backend, normal):
    cache = kvnumba.KVCache(3, 4, 1, 8, backend=backend)
    k, v = normal(3, 1, 2, 8), normal(3, 1, 2, 8)
    cache.update(k, v)
    keys, values = cache.get_full_kv()
    np.testing.assert_array_equal(np.stack(keys), k)
    np.testing.assert_array_equal(np.stack(values), v)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.dtype("float32"), "float16"])
def test_arrays_may_be_used_directly(backend, normal, dtype):
    cache = kvnumba.KVCache(2, 6, 2, 8, dtype, backend=backend)
    assert cache.k_cache.shape == cache.v_cache.shape == (2, 2, 6, 8)
    assert cache.k_cache.dtype == np.dtype(dtype)
    k, v = normal(2, 2, 4, 8), normal(2, 2, 4, 8)
    cache.k_cache[:, :, :4] = k
    cache.v_cache[:, :, :4] = v
    cache.seq_lens[0] = 3
    cache.seq_lens[1] = 4
    name = np.dtype(dtype).name
    oracle.assert_stored(cache.get_kv(0)[0], k[0, :, :3], name)
    q = normal(2, 4, 1, 8)
    out = cache.attend(q)
    for b in range(2):
        kept = cache.get_kv(b)
        want, _ = oracle.attention(q[b].swapaxes(0, 1), *kept)
        np.testing.assert_allclose(out[b].swapaxes(0, 1), want, atol=1e-5)


def test_reads_are_copies(backend, normal):
    cache = kvnumba.KVCache(1, 4, 1, 8, backend=backend)
    k = normal(1, 1, 4, 8)
    cache.update(k, k)
    cache.get_kv(0)[0][:] = 7
    np.testing.assert_array_equal(cache.get_kv(0)[0], k[0])


def test_stale_storage_never_shows(backend, normal):
    cache = kvnumba.KVCache(1, 100, 2, 8, backend=backend)
    cache.k_cache[:] = np.nan
    cache.v_cache[:] = np.nan
    k = normal(1, 2, 70, 8)
    cache.update(k, k)
    assert np.isfinite(cache.get_kv(0)[0]).all()
    assert np.isfinite(cache.attend(normal(1, 4, 5, 8))).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_cache_counts_its_scales(backend, bits, normal):
    cache = kvnumba.QuantizedKVCache(2, 16, 4, 128, bits=bits, backend=backend)
    rows = 2 * 16 * 4
    assert cache.memory_bytes() == 2 * rows * (128 * bits // 8 + 8)
    assert cache.savings_vs_fp32() == pytest.approx({8: 0.265625, 4: 0.140625}[bits])
    assert "of float32" in repr(cache)
    k, v = normal(2, 4, 16, 128), normal(2, 4, 16, 128)
    cache.update(k, v)
    oracle.assert_stored(cache.get_kv(1)[1], v[1], f"int{bits}")


def test_memory_is_what_the_arrays_take(backend, fmt):
    cache = kvnumba.KVCache(2, 10, 3, 8, fmt, num_layers=2, backend=backend)
    codes = cache.k_cache.nbytes + cache.v_cache.nbytes
    scales = 2 * 2 * 2 * (2 * 10 * 3) * 4 if fmt.startswith("int") else 0
    assert cache.memory_bytes() == codes + scales == 20 * cache.bytes_per_token()


def test_the_keyword_num_heads_works(backend):
    assert kvnumba.KVCache(1, 4, num_heads=2, head_dim=8, backend=backend).num_kv_heads == 2
    assert kvnumba.QuantizedKVCache(1, 4, num_heads=2, head_dim=8, bits=4, backend=backend).num_kv_heads == 2
    with pytest.raises(TypeError, match="num_heads is another name of num_kv_heads"):
        kvnumba.KVCache(1, 4, num_heads=2, num_kv_heads=2, head_dim=8, backend=backend)


def test_one_line_repr(backend, fmt):
    text = repr(kvnumba.KVCache(2, 10, 3, 8, fmt, num_layers=2, backend=backend))
    assert "\n" not in text
    for part in ("KVCache(B=2, tokens=0/10, layers=2, H=3, D=8", fmt, backend):
        assert part in text


class TestLayers:
    def test_the_length_moves_with_the_last(self, backend, fmt, normal):
        cache = kvnumba.KVCache(2, 8, 2, 8, fmt, num_layers=3, backend=backend)
        k, v = normal(3, 2, 2, 5, 8), normal(3, 2, 2, 5, 8)
        for layer in range(3):
            assert cache.seq_lens == [0, 0]
            cache.update(k[layer], v[layer], layer=layer)
            oracle.assert_stored(cache.get_kv(1, layer=layer)[0], k[layer, 1], fmt)
        assert cache.seq_lens == [5, 5]
        for layer in range(3):
            oracle.assert_stored(cache.get_kv(0, layer=layer)[1], v[layer, 0], fmt)

    def test_a_layer_attends_to_its_new_tokens_at_once(self, backend, normal):
        cache = kvnumba.KVCache(1, 8, 2, 8, num_layers=2, backend=backend)
        k, v, q = normal(1, 2, 4, 8), normal(1, 2, 4, 8), normal(1, 2, 4, 8)
        cache.update(k, v, layer=0)
        want, _ = oracle.attention(q[0].swapaxes(0, 1), k[0], v[0])
        np.testing.assert_allclose(cache.attend(q, layer=0)[0].swapaxes(0, 1), want, atol=1e-5)
        with pytest.raises(ValueError, match="q: expected at most as many tokens as an element holds, 0"):
            cache.attend(q, layer=1)

    def test_a_pass_that_broke_off_begins_again(self, backend, normal):
        cache = kvnumba.KVCache(1, 8, 2, 8, num_layers=2, backend=backend)
        cache.update(normal(1, 2, 4, 8), normal(1, 2, 4, 8), layer=0)
        k = normal(1, 2, 2, 8)
        cache.update(k, k, layer=0)
        cache.update(k, k, layer=1)
        assert cache.seq_lens == [2]
        np.testing.assert_array_equal(cache.get_kv(0, layer=0)[0], k[0])

    def test_out_of_order_is_refused(self, backend, normal):
        cache = kvnumba.KVCache(1, 8, 2, 8, num_layers=3, backend=backend)
        k = normal(1, 2, 4, 8)
        with pytest.raises(ValueError, match="layer: layers are written in order, next is layer 0; got 1"):
            cache.update(k, k, layer=1)
        cache.update(k, k, layer=0)
        with pytest.raises(ValueError, match="next is layer 1; got 2"):
            cache.update(k, k, layer=2)
        with pytest.raises(ValueError, match="expected 4 new tokens, as in layer 0; got 3 in layer 1"):
            cache.update(k[:, :, :3], k[:, :, :3], layer=1)
        with pytest.raises(ValueError, match=r"positions: expected \[0\], as in layer 0; got \[2\]"):
            cache.update(k, k, [2], layer=1)
        cache.update(k, k, layer=1)
        cache.update(k, k, layer=2)
        assert cache.seq_lens == [4]


class TestElements:
    """Batch elements are shortened, copied, saved and loaded, each on its own."""

    @pytest.fixture
    def cache(self, backend, fmt, normal):
        cache = kvnumba.KVCache(3, 12, 2, 8, fmt, num_layers=2, backend=backend)
        for layer in range(2):
            cache.update(normal(3, 2, 5, 8), normal(3, 2, 5, 8), layer=layer)
        return cache

    def test_truncate(self, cache, normal):
        kept = cache.get_kv(1, layer=1)[0]
        cache.truncate(1, 2)
        assert cache.seq_lens == [5, 2, 5]
        np.testing.assert_array_equal(cache.get_kv(1, layer=1)[0], kept[:, :2])
        cache.update(normal(3, 2, 1, 8), normal(3, 2, 1, 8))  # a pass that breaks off
        cache.truncate(0, 5)
        assert cache.seq_lens == [5, 2, 5]
        with pytest.raises(ValueError, match="next is layer 0; got 1"):
            cache.update(normal(3, 2, 1, 8), normal(3, 2, 1, 8), layer=1)
        with pytest.raises(ValueError, match="length: expected at most the element's 2 tokens; got 3"):
            cache.truncate(1, 3)
        with pytest.raises(ValueError, match="batch_idx: expected 0 to 2; got 3"):
            cache.truncate(3, 0)

    def test_fork(self, cache, normal):
        cache.truncate(2, 3)
        want = [cache.get_kv(2, layer=layer) for layer in range(2)]
        cache.fork(2, into=0)
        assert cache.seq_lens == [3, 5, 3]
        for layer in range(2):
            for have, expected in zip(cache.get_kv(0, layer=layer), want[layer], strict=True):
                np.testing.assert_array_equal(have, expected)
            cache.update(normal(3, 2, 1, 8), normal(3, 2, 1, 8), layer=layer)  # each goes its own way
        assert (cache.get_kv(0)[0][:, :3] == cache.get_kv(2)[0][:, :3]).all()
        assert (cache.get_kv(0)[0][:, 3] != cache.get_kv(2)[0][:, 3]).any()
        with pytest.raises(ValueError, match="into: expected 0 to 2; got 3"):
            cache.fork(0, 3)

    def test_save_and_load(self, cache, backend, fmt, tmp_path):
        cache.truncate(1, 0)
        cache.truncate(2, 3)
        cache.save(tmp_path / "a.kv", fingerprint="a model")
        assert [file.name for file in tmp_path.iterdir()] == ["a.kv"]
        other = kvnumba.KVCache(3, 5, 2, 8, fmt, num_layers=2, backend=backend)  # of another length
        with pytest.raises(ValueError, match="fingerprint: expected ''; the file has 'a model'"):
            other.load(tmp_path / "a.kv")
        assert other.seq_lens == [0, 0, 0]
        other.load(tmp_path / "a.kv", fingerprint="a model")
        assert other.seq_lens == [5, 0, 3]
        for layer in range(2):
            for b in range(3):
                for have, want in zip(
                    other.get_kv(b, layer=layer), cache.get_kv(b, layer=layer), strict=True
                ):
                    np.testing.assert_array_equal(have, want)
        short = kvnumba.KVCache(3, 4, 2, 8, fmt, num_layers=2, backend=backend)
        with pytest.raises(kvnumba.CacheFull, match="element of 5 tokens, more than max_seq_len=4"):
            short.load(tmp_path / "a.kv", fingerprint="a model")
        fewer = kvnumba.KVCache(2, 12, 2, 8, fmt, num_layers=2, backend=backend)
        with pytest.raises(ValueError, match="batch_size: expected 2; the file has 3"):
            fewer.load(tmp_path / "a.kv", fingerprint="a model")
        data = bytearray((tmp_path / "a.kv").read_bytes())
        data[-9] ^= 1
        (tmp_path / "b.kv").write_bytes(data)
        with pytest.raises(ValueError, match="its blocks are damaged"):
            other.load(tmp_path / "b.kv", fingerprint="a model")
        assert other.seq_lens == [5, 0, 3]


def test_another_caches_file_is_refused(backend, normal, tmp_path):
    cache = kvnumba.KVCache(1, 4, 2, 8, backend=backend)
    cache.save(tmp_path / "a.kv")
    paged = kvnumba.PagedKVCache(4, 4, 2, 8, 1, backend=backend)
    with pytest.raises(ValueError, match="block_size: expected 4; the file has None"):
        paged.load(tmp_path / "a.kv")
    paged.save(tmp_path / "b.kv")
    with pytest.raises(ValueError, match="batch_size: expected 1; the file has None"):
        cache.load(tmp_path / "b.kv")
