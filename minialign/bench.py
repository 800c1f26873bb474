"""`minialign bench`: a method's step over the network passes that it cannot do without."""

import importlib
import json
import time
from pathlib import Path

from minialign.run import LANGUAGE, LANGUAGE_WORLDS, WORLDS, UserError, load_world, nearest, settings


def floor_seconds(policy, forward: list[int], backward: list[int], prompts: list[str]) -> float:
    """Bare network passes: forward ones of so many rows each, then passes of so many rows forward and backward."""
    import torch

    from minialign.policies.architectures import call_network

    condition = policy.encode([prompts[i % len(prompts)] for i in range(max(forward + backward))])
    states, parameters = policy.draw_noise(len(condition))[:, 0], policy.parameters()
    timesteps = policy.timesteps[:1].expand(len(condition))

    def call(rows: int):
        part = condition[torch.arange(rows, device=policy.device)]
        return call_network(policy.network, states[:rows], timesteps[:rows], part.inputs | part.shared)

    started = time.perf_counter()
    with torch.no_grad():
        for rows in forward:
            call(rows)
    for rows in backward:
        call(rows).sum().backward()
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    for p in parameters:
        p.grad = None
    return elapsed


def ddpo_passes(policy, config, metrics: dict) -> tuple[list[int], list[int]]:
    """What a DDPO round cannot do without: S forward passes, and forward and backward passes of all its states."""
    rows = config.num_prompts * config.group_size
    passes = range(0, policy.num_steps, config.steps_per_pass)
    backward = [rows * min(config.steps_per_pass, policy.num_steps - first) for first in passes]
    return [rows] * policy.num_steps, backward * config.num_epochs


def b2diffurl_passes(policy, config, metrics: dict) -> tuple[list[int], list[int]]:
    """Prefixes once, branches b times, and the window of the images that this stage kept."""
    window, kept = int(metrics["window"]), int(metrics["kept_positive"] + metrics["kept_negative"])
    branches = config.num_prompts * config.num_branches
    forward = [config.num_prompts] * (policy.num_steps - window) + [branches] * window
    passes = range(0, window, config.steps_per_pass)
    return forward, [kept * min(config.steps_per_pass, window - first) for first in passes] * config.num_epochs


def rlcm_passes(policy, config, metrics: dict) -> tuple[list[int], list[int]]:
    """H calls of the round's rows, and forward and backward passes of its H - 1 transitions, minibatch by minibatch."""
    rows, actions = config.num_prompts * config.group_size, policy.num_steps - (config.terminal_std == 0)
    actions = min(actions, config.trained_actions or actions)
    return [rows] * policy.num_steps, [rows // config.num_minibatches * actions] * config.num_minibatches


def language_floor_seconds(policy, config, metrics: dict, prompts: list[str]) -> float:
    """A PPO round's bare passes: generation with a cache, word by word; reference and critic once; then the epochs.

    Rows have random tokens, as many as the round's: each prompt's and `longest` of the answer.
    """
    import torch

    from minialign.policies.language import cache_name, named_inputs

    rows, length = config.num_prompts * config.group_size, int(metrics["longest"])
    prompt_tokens, _ = policy.encode([prompts[i % len(prompts)] for i in range(rows)])
    answer = torch.randint(2, prompt_tokens.max() + 1, (rows, length), generator=torch.Generator().manual_seed(0))
    whole = torch.cat([prompt_tokens, answer.to(prompt_tokens.device)], 1)
    critic, cache_is = policy.critic, cache_name(named_inputs(policy.network))
    started = time.perf_counter()
    with torch.no_grad():
        cache, new = None, prompt_tokens
        for step in range(length):
            output = policy.network(new, use_cache=True, logits_to_keep=1, **{cache_is: cache})
            cache = output[cache_is if cache_is in output else "past_key_values"]
            new = answer[:, step : step + 1]
        policy.network(whole, use_cache=False, logits_to_keep=length)
        critic(whole, use_cache=False, logits_to_keep=length)
    for _ in range(config.num_epochs):
        for part in whole.split(config.rows_per_pass):
            policy.network(part, use_cache=False, logits_to_keep=length).logits.sum().backward()
            critic(part, use_cache=False, logits_to_keep=length).logits.sum().backward()
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    for p in policy.parameters():
        p.grad = None
    return elapsed


PASSES = {"ddpo": ddpo_passes, "b2diffurl": b2diffurl_passes, "rlcm": rlcm_passes}


MEASURED = (*PASSES, *LANGUAGE, "teleport")


def bench_row(method_name: str, world_name: str, rounds: int, device: str) -> dict:
    """A method's step beside its floor, alternating, so that a slow moment of the machine touches both; medians."""
    import statistics

    import torch

    method = importlib.import_module(f"minialign.methods.{method_name}")
    world_settings, config = settings(method_name, world_name, [], rounds + 1)
    world = load_world(world_name, world_settings, method_name)
    if device != "cpu":
        world.policy.to(device)

    def free_reward(samples, prompts):
        return samples.float().flatten(1).mean(1) if torch.is_tensor(samples) else torch.randn(len(samples))

    measured, floors = [], []
    for step in method.train(world.policy, free_reward, world.prompts, config, torch.Generator().manual_seed(0)):
        if method_name in LANGUAGE:
            floor = language_floor_seconds(world.policy, config, step.metrics, world.prompts)
        else:
            passes = PASSES[method_name](world.policy, config, step.metrics)
            floor = floor_seconds(world.policy, *passes, world.prompts)
        if step.number:  # the first round warms up
            measured.append(step.seconds)
            floors.append(floor)
    step_seconds, floor = statistics.median(measured), statistics.median(floors)
    return dict(
        method=method_name, world=world_name, device=device, step_seconds=round(step_seconds, 4),
        floor_seconds=round(floor, 4), ratio=round(step_seconds / floor, 3),
    )  # fmt: skip


def teleport_row(device: str, dim: int = 64 * 64 * 3, rank: int = 512, num_images: int = 2000, batch: int = 64) -> dict:
    """Seconds for the statistics of `num_images` images and for the jump of a batch; memory beside the data's own."""
    import resource

    import torch

    from minialign.exact import Gaussian

    generator = torch.Generator().manual_seed(0)
    data = (torch.randn(num_images, dim, generator=generator) * torch.linspace(3, 0.01, dim)).to(device)
    noise = torch.randn(batch, dim, generator=generator).to(device)
    peak, laps = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [time.perf_counter()]
    statistics = Gaussian.fit(data, rank)
    laps.append(time.perf_counter())
    statistics.flow(80 * noise, 80.0, 5.0).cpu()
    laps.append(time.perf_counter())
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 / data.nbytes
    return dict(
        method="teleport", dim=dim, rank=rank, num_images=num_images, batch=batch, device=device,
        statistics_seconds=round(laps[1] - laps[0], 3), jump_seconds=round(laps[2] - laps[1], 4),
        memory_over_data=round(more, 2),
    )  # fmt: skip


def command_bench(args) -> int:
    rows = []
    for method in args.methods:
        if method == "teleport":  # no training step: the statistics and the jump
            rows.append(teleport_row(args.device))
            print("teleport, {dim} dimensions, rank {rank} ({device}): statistics of {num_images} images "
                  "{statistics_seconds} s, jump of {batch} {jump_seconds} s, memory {memory_over_data} times the data"
                  .format(**rows[-1]))  # fmt: skip
            continue
        if method not in MEASURED:
            raise UserError(nearest("method to measure", method, MEASURED))
        for name in ["assistant"] if method in LANGUAGE else args.worlds:
            if name not in WORLDS or (name in LANGUAGE_WORLDS and method not in LANGUAGE):
                raise UserError(nearest("world", name, [w for w in WORLDS if w not in LANGUAGE_WORLDS]))
            rows.append(bench_row(method, name, args.rounds, args.device))
            print(
                "{method} on {world} ({device}): step {step_seconds} s, floor {floor_seconds} s, ratio {ratio}".format(
                    **rows[-1]
                )
            )
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=2))
    return 0
