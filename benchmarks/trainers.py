"""One trainer in a process of its own: `python trainers.py NAME SIZES`.

Reads the number of steps to run from stdin, prints the seconds they took; an empty
line ends it, and prints the peak memory above what the process held before the
trainer was made (data and imported libraries), in MiB.
"""

import json
import sys
import time

import torch


def ours(x, d_sae, k, steps, **changes):
    from saeutils.distributed import Group
    from saeutils.store import TensorStore
    from saeutils.train_config import TrainConfig
    from saeutils.trainer import Trainer

    config = TrainConfig(
        d_sae=d_sae,
        k=k,
        steps=steps,
        batch_size=len(x[0]),
        device=str(x.device),
        **changes,
    )
    trainer = Trainer(TensorStore(x.flatten(0, 1).cpu()), config, Group())
    index = torch.arange(x.shape[1])

    def step(i):
        with torch.no_grad():
            trainer.step(x[i % len(x)], index)

    return step


def ours_torch(x, d_sae, k, steps):
    """The plain torch bodies, as on any device that is not a CPU."""
    from saeutils import kernels

    kernels._REFERENCE = True
    return ours(x, d_sae, k, steps)


def ours_bf16(x, d_sae, k, steps):
    return ours(x, d_sae, k, steps, encoder_dtype="bfloat16")


def encode_only(x, d_sae, k, steps):
    """The one dense product that no trainer can do without: a lower bound."""
    W = torch.randn(d_sae, x.shape[2], device=x.device)
    out = torch.empty(min(512, x.shape[1]), d_sae, device=x.device)

    def step(i):
        for rows in x[i % len(x)].split(len(out)):
            torch.mm(rows, W.T, out=out[: len(rows)])

    return step


def sae_lens(x, d_sae, k, steps):
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
        total_training_samples=steps * len(x[0]), train_batch_size_samples=len(x[0]),
        device=str(x.device), autocast=False, lr=1e-3, lr_end=1e-4,
        lr_scheduler_name="constant", lr_warm_up_steps=0, lr_decay_steps=0,
        n_restart_cycles=1, adam_beta1=0.9, adam_beta2=0.999, dead_feature_window=1000,
        feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=x.shape[2], d_sae=d_sae, k=k, device=str(x.device))
    )
    trainer = SAETrainer(config, sae, iter(()))

    def step(i):
        trainer.step(x[i % len(x)])
        trainer.n_training_steps += 1

    return step


def sparsify(x, d_sae, k, steps):
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(x.shape[2], SparseCoderConfig(num_latents=d_sae, k=k), x.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    fired = torch.zeros(d_sae, dtype=torch.long, device=x.device)

    def step(i):
        out = sae(x[i % len(x)], dead_mask=fired > 10_000_000)
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        sae.set_decoder_norm_to_unit_norm()
        fired.add_(x.shape[1])
        fired[out.latent_indices.flatten()] = 0

    return step


def dictionary_learning(x, d_sae, k, steps):
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=steps, activation_dim=x.shape[2], dict_size=d_sae, k=k, layer=0,
        lm_name="none", warmup_steps=0, device=str(x.device),
    )  # fmt: skip
    return lambda i: trainer.update(i, x[i % len(x)])


def dense_torch(x, d_sae, k, steps):
    """What one writes in ten lines: dense latents, autograd, fused Adam."""
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, x.shape[2]), dim=1)
    W_dec = W_dec.to(x.device).requires_grad_()
    W_enc = W_dec.detach().T.clone().requires_grad_()
    b_enc = torch.zeros(d_sae, device=x.device, requires_grad=True)
    b_dec = torch.zeros(x.shape[2], device=x.device, requires_grad=True)
    optimizer = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=1e-3, fused=True)

    def step(i):
        rows = x[i % len(x)]
        pre = (rows - b_dec) @ W_enc + b_enc
        top = pre.topk(k, dim=-1, sorted=False)
        z = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
        (z @ W_dec + b_dec - rows).square().sum(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return step


def memory_mib(device: torch.device, peak: bool) -> float:
    """Resident (or, on a GPU, allocated) memory of this process, now or at its peak."""
    if device.type == "cuda":
        stats = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return stats() / 2**20
    name = "VmHWM" if peak else "VmRSS"
    with open("/proc/self/status") as status:
        return (
            int(next(line for line in status if line.startswith(name)).split()[1])
            / 1024
        )


def main() -> None:
    name, sizes = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(sizes["threads"])
    device = torch.device(sizes["device"])
    torch.manual_seed(0)
    d_in, k, batch = sizes["d_in"], sizes["k"], sizes["batch"]
    x = torch.randn(4 * batch, d_in) @ (torch.randn(d_in, d_in) / d_in**0.5)
    x = x.reshape(4, batch, d_in).to(device)
    arguments = (sizes["d_sae"], k, 1_000_000)
    # a tiny trainer first: imports, and numba's compiled code, count as the base
    warm = globals()[name](x[:1, : min(batch, 64), :8].contiguous(), 64, 4, 1_000_000)
    warm(0)
    if device.type == "cpu":
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # VmHWM starts again from here
    base = memory_mib(device, peak=False)
    step, done = globals()[name](x, *arguments), 0
    print("ready", flush=True)
    for line in sys.stdin:
        if not line.strip():
            break
        began = time.perf_counter()
        for _ in range(int(line)):
            step(done)
            done += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(time.perf_counter() - began, flush=True)
    print(memory_mib(device, peak=True) - base, flush=True)


if __name__ == "__main__":
    main()
