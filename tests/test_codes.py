"""Codes on disk: equal to the dense codes by row and by column, whatever happens."""

import resource
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import saeutils.codes
from saeutils.codes import CodeStore, CodeWriter, encode, sae_fingerprint
from saeutils.sae import as_codes, encode_sparse
from saeutils.storage import AtomicFile
from saeutils.store import StoreWriter, TensorStore


class Sae:
    """z = relu(x W + b), the k largest a row."""

    def __init__(self, d_in=4, d_sae=30, k=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.W_dec = torch.randn(d_sae, d_in, generator=generator)
        self.b = torch.randn(d_sae, generator=generator) / 9
        self.k = k

    def encode(self, x):
        pre = (x @ self.W_dec.T + self.b).relu()
        top = pre.topk(self.k)
        return torch.zeros_like(pre).scatter(1, top.indices, top.values)


def rows(n, d=4, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def save(path, sae=None, x=None, **options):
    options = {"progress": False, "dense_bytes": 30 * 4 * 7, **options}
    sae = Sae() if sae is None else sae
    return encode(sae, rows(100) if x is None else x, path, **options)


def content(path):
    return {f.name: f.read_bytes() for f in path.iterdir() if f.name != ".lock"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(saeutils.codes, "SHARD_ENTRIES", 60)


@given(data=st.data())
def test_rows_and_columns_equal_the_dense_codes(tmp_path_factory, data):
    n, d_sae = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, d_sae))
    chunk = data.draw(st.integers(1, 30))
    path = tmp_path_factory.mktemp("codes")
    sae, x = Sae(d_sae=d_sae, k=k), rows(n)
    codes = save(path, sae, x, dense_bytes=chunk * d_sae * 4)
    z = torch.cat([sae.encode(x[i : i + chunk]) for i in range(0, n, chunk)])
    assert (len(codes), codes.d_sae, codes.nnz) == (n, d_sae, z.count_nonzero())
    assert torch.equal(codes[:].dense(d_sae), z)
    assert torch.equal(codes.counts, (z != 0).sum(0))
    index = data.draw(st.lists(st.integers(0, n - 1), max_size=2 * n))
    wanted = z[torch.tensor(index, dtype=int)]
    assert torch.equal(codes.gather(index).dense(d_sae), wanted)
    size = data.draw(st.integers(1, n + 2))
    chunks = list(codes.chunks(size))
    assert torch.equal(torch.cat([c.codes.dense(d_sae) for c in chunks]), z)
    assert torch.cat([c.index for c in chunks]).tolist() == list(range(n))
    for latent in range(d_sae):
        fired = z[:, latent].nonzero()[:, 0]
        column = codes.column(latent)
        assert torch.equal(column.rows, fired)
        assert torch.equal(column.values, z[fired, latent])
    codes.verify()


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_exact_for_the_classes_of_sae_lens(tmp_path, architecture):
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(architecture)
    extra = {"k": 3} if architecture == "topk" else {}
    config = config_class(d_in=4, d_sae=30, dtype="float32", device="cpu", **extra)
    sae = sae_class(config)
    torch.manual_seed(0)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = rows(100)
    codes = save(tmp_path, sae, x, dense_bytes=2**20)
    z = sae.encode(x).detach()
    assert 0 < codes.nnz < z.numel()
    assert torch.equal(codes[:].dense(30) != 0, z != 0)
    torch.testing.assert_close(codes[:].dense(30), z)


def test_only_what_the_kernels_know_is_encoded_by_them(monkeypatch):
    from sae_lens import TopKSAE, TopKSAEConfig

    def refuse(*_):
        raise AssertionError("encoded dense")

    class Halved(TopKSAE):
        def encode(self, x):
            return super().encode(x) / 2

    config = dict(d_in=4, d_sae=30, k=3, dtype="float32", device="cpu")
    x = rows(50)
    for sae_class in (TopKSAE, Halved):
        for options in ({}, {"rescale_acts_by_decoder_norm": True}):
            sae = sae_class(TopKSAEConfig(**config, **options)).requires_grad_(False)
            sae.W_dec.mul_(3)
            dense = sae.encode(x)
            with monkeypatch.context() as patch:
                if sae_class is TopKSAE and not options:
                    patch.setattr(TopKSAE, "encode", refuse)
                codes = encode_sparse(sae, x)
            torch.testing.assert_close(codes.dense(30), dense)
            assert ((codes.rows * 30 + codes.indices).diff() > 0).all()


def test_provenance_travels_from_the_store(tmp_path):
    frame = pd.DataFrame({"id": np.arange(100) + 5, "split": ["train"] * 100})
    codes = save(tmp_path / "tensor", x=TensorStore(rows(100), frame))
    assert codes.provenance.astype({"split": str}).equals(frame)
    with StoreWriter(tmp_path / "store", hook="x", d_in=4, rows_per_shard=31) as writer:
        writer.append(rows(100), {name: frame[name].tolist() for name in frame})
    codes = save(tmp_path / "codes", x=tmp_path / "store")
    assert codes.provenance.astype({"split": str}).equals(frame)
    assert codes.records(40, 43)["id"].tolist() == [45, 46, 47]


def test_dead_latents_and_codes_without_any_entry(tmp_path):
    sae = Sae()
    sae.b -= 100
    codes = save(tmp_path, sae)
    assert codes.nnz == 0 and len(codes) == 100
    assert codes[3:5].indptr.tolist() == [0, 0, 0]
    assert len(codes.column(7).rows) == 0
    assert codes.counts.sum() == 0


def test_float16_values(tmp_path):
    codes = save(tmp_path / "a", dtype="float16")
    exact = save(tmp_path / "b")
    assert torch.equal(codes[:].values, exact[:].values.half().float())
    assert codes.column(2).values.dtype == torch.float32
    with pytest.raises(ValueError, match=r"row 9, latent \d+: .* stored as float16"):
        x = rows(100)
        x[9] *= 1e6
        save(tmp_path / "c", x=x, dtype="float16")


def test_wide_dictionaries_have_wide_indices(tmp_path):
    sae = Sae(d_sae=70_000, k=2)
    codes = save(tmp_path, sae, rows(20), dense_bytes=2**22)
    assert codes[:].indices.max() > 2**16
    assert torch.equal(codes[:].dense(70_000), sae.encode(rows(20)))


def test_an_interrupted_run_is_completed_to_the_same_bytes(tmp_path, monkeypatch):
    save(tmp_path / "whole")
    real, calls = AtomicFile.commit, 0

    def commit(self):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return real(self)

    for stop in range(1, 22):
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(AtomicFile, "commit", commit)
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path / "part")
        save(tmp_path / "part")
        assert content(tmp_path / "part") == content(tmp_path / "whole"), stop
        shutil.rmtree(tmp_path / "part")


def test_columns_are_made_again_when_they_are_not_these(tmp_path):
    codes = save(tmp_path)
    wanted = codes.column(4)
    (tmp_path / "columns.json").write_text('{"codes": "of something else"}')
    assert torch.equal(CodeStore.open(tmp_path).column(4).rows, wanted.rows)
    assert not list(tmp_path.glob(".*.tmp"))


def test_what_changed_is_refused(tmp_path):
    save(tmp_path)
    for options in ({"sae": Sae(seed=1)}, {"sae": Sae(k=2)}, {"x": rows(100, seed=2)}):
        with pytest.raises(ValueError, match="something else"):
            save(tmp_path, **options)
    with pytest.raises(ValueError, match=r"'saeutils\.codes', expected"):
        StoreWriter(tmp_path, hook="x", d_in=4)


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="d_in = 5, the SAE 4"):
        save(tmp_path / "a", x=rows(10, d=5))
    with pytest.raises(ValueError, match="float32, float16"):
        save(tmp_path / "a", dtype="int8")
    assert not (tmp_path / "a").exists()
    x = rows(100)
    x[50, 2] = float("nan")
    with pytest.raises(ValueError, match="row 5"):
        save(tmp_path / "b", x=x)
    codes = save(tmp_path / "c")
    for index in ([100], [-1]):
        with pytest.raises(IndexError, match="100 rows"):
            codes.gather(index)
    with pytest.raises(IndexError, match="latent 30"):
        codes.column(30)
    with pytest.raises(ValueError, match="gather"):
        codes[::2]
    with CodeWriter(tmp_path / "d", d_sae=3, expected_rows=9) as writer:
        writer.append(as_codes(torch.ones(9, 3)), TensorStore(torch.ones(9, 3)))
    with pytest.raises(ValueError, match="0 of 9 rows"):
        CodeWriter(tmp_path / "e", d_sae=3, expected_rows=9).close()


def test_damage_is_found(tmp_path):
    codes = save(tmp_path)
    path = tmp_path / "00001.indices.npy"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"00001\.indices\.npy is damaged"):
        codes.verify()


def test_fingerprint_of_an_sae():
    assert sae_fingerprint(Sae()) == sae_fingerprint(Sae())
    assert sae_fingerprint(Sae()) != sae_fingerprint(Sae(k=2))
    other = Sae()
    other.b[3] += 1
    assert sae_fingerprint(Sae()) != sae_fingerprint(other)


def test_an_sae_has_the_same_fingerprint_loaded_and_on_another_device(tmp_path):
    from sae_lens import TopKSAE, TopKSAEConfig

    from saeutils.sae import load
    from saeutils.sae import save as save_sae

    sae = TopKSAE(TopKSAEConfig(d_in=4, d_sae=8, k=2))
    before = sae_fingerprint(sae)
    sae.cfg.device = "cuda"
    assert sae_fingerprint(sae) == before
    sae.cfg.device = "cpu"
    save_sae(sae, tmp_path / "sae")
    assert sae_fingerprint(load(tmp_path / "sae")) == before


def test_size_on_disk_is_that_of_the_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(saeutils.codes, "SHARD_ENTRIES", 2**17)
    codes = save(tmp_path, Sae(d_sae=300, k=32), rows(20_000), dense_bytes=2**21)
    size = sum(f.stat().st_size for f in tmp_path.glob("*.npy"))
    assert size < 1.1 * codes.nnz * (2 + 4)


@pytest.mark.skipif(sys.platform != "linux", reason="limits address space")
def test_encoding_and_columns_stay_under_an_address_space_limit(tmp_path):
    """6,000 × 32,768 dense is 750 MiB; here are 400 beyond what the imports take.

    benchmarks/codes.py does the same with a million rows and a limit of 2 GiB.
    """
    script = textwrap.dedent(
        """
        import resource, sys
        import torch
        from saeutils.codes import encode
        from saeutils.store import TensorStore
        torch.set_num_threads(1)

        class Sae:
            W_dec = torch.randn(32768, 8)
            def encode(self, x):
                pre = x @ self.W_dec.T
                top = pre.topk(32)
                return torch.zeros_like(pre).scatter(1, top.indices, top.values)

        with open("/proc/self/statm") as f:
            used = int(f.read().split()[0]) * resource.getpagesize()
        limit = used + 400 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        x = torch.randn(int(sys.argv[2]), 8)
        codes = encode(Sae(), x, sys.argv[1], progress=False, dtype="float16")
        assert codes.nnz == 32 * len(x)
        assert sum(len(codes.column(i).rows) for i in range(32768)) == codes.nnz
        """
    )
    n = 6_000
    run = subprocess.run(
        [sys.executable, "-c", script, tmp_path, str(n)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
