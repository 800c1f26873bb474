"""`minialign bench`: a method's step over the network passes that it cannot do without.

A method says which passes these are, `floor(policy, config, metrics)`: keyword arguments of `denoising_seconds`, or of
`language_seconds` where policies talk. What has no steps brings a row of its own, `bench(device)`.
"""

import json
import statistics
import time
from collections.abc import Callable

from minialign.methods import CATALOGUE, Method
from minialign.prepare import (
    UserError,
    check_writable,
    find_device,
    find_method,
    nearest,
    policy_kind,
    ready_world,
    settings,
    takes_sets,
    training,
    worlds_of,
)
from minialign.recipes import BENCH_WORLDS, WORLDS


def seconds_of(policy, passes: Callable[[], None]) -> float:
    """How long they take on the policy's device; no gradient is left behind."""
    import torch

    started = time.perf_counter()
    passes()
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    for p in policy.parameters():
        p.grad = None
    return elapsed


def denoising_seconds(policy, prompts: list, *, forward: list[int], backward: list[int], decode: int = 0) -> float:
    """Bare network passes: forward ones of so many rows each, then passes of so many rows forward and backward.

    decode: rows that the decoder turns into samples, for methods whose whole round is sampling.
    """
    import torch

    from minialign.policies.architectures import call_network

    condition = policy.encode([prompts[i % len(prompts)] for i in range(max(forward + backward))])
    states = policy.draw_noise(len(condition))[:, 0]
    timesteps = policy.timesteps[:1].expand(len(condition))

    def call(rows: int):
        part = condition[torch.arange(rows, device=policy.device)]
        return call_network(policy.network, states[:rows], timesteps[:rows], part.inputs | part.shared)

    def passes() -> None:
        with torch.no_grad():
            for rows in forward:
                call(rows)
            if decode:
                policy.decode(states[:decode])
        for rows in backward:
            call(rows).sum().backward()

    return seconds_of(policy, passes)


def language_seconds(
    policy, prompts: list[str], *, length: int, forward: list[int], backward: list[int], answers: int | None = None
) -> float:
    """Bare passes of answers of `length` tokens: generation with a cache, word by word, of `answers` or forward[0];
    then forward passes of so many rows through policy and critic, and passes of so many forward and backward.

    Rows have random tokens, as many as the round's: each prompt's and `length` of the answer.
    """
    import torch

    from minialign.policies.architectures import cache_name, named_inputs

    answers = forward[0] if answers is None else answers
    prompt_tokens, _ = policy.encode([prompts[i % len(prompts)] for i in range(max(answers, *forward, *backward))])
    size, seed = (len(prompt_tokens), length), torch.Generator().manual_seed(0)
    answer = torch.randint(2, prompt_tokens.max() + 1, size, generator=seed).to(prompt_tokens.device)
    whole, cache_is = torch.cat([prompt_tokens, answer], 1), cache_name(named_inputs(policy.network))
    networks = [policy.network, *([policy.critic] if policy.critic is not None else [])]

    def passes() -> None:
        with torch.no_grad():
            cache, new = None, prompt_tokens[:answers]
            for step in range(length):
                output = policy.network(new, use_cache=True, logits_to_keep=1, **{cache_is: cache})
                cache = output[cache_is if cache_is in output else "past_key_values"]
                new = answer[:answers, step : step + 1]
            for rows in forward:
                for network in networks:
                    network(whole[:rows], use_cache=False, logits_to_keep=length)
        for rows in backward:
            for network in networks:
                network(whole[:rows], use_cache=False, logits_to_keep=length).logits.sum().backward()

    return seconds_of(policy, passes)


def free_reward(samples, prompts):
    """It costs nothing, and no two samples have the same."""
    import torch

    return samples.float().flatten(1).mean(1) if torch.is_tensor(samples) else torch.randn(len(samples))


def free_set_reward(samples, prompts):
    """The same of a set."""
    return samples.float().mean()


def bench_row(method: Method, world_name: str, rounds: int, device: str) -> dict:
    """A method's step beside its floor, alternating, so that a slow moment of the machine touches both; medians."""
    import torch

    chosen = settings(method, world_name, [], rounds + 1)
    world = ready_world(method, world_name, chosen)
    policy, config = world.policy, chosen.loop or chosen.config
    if device != "cpu":
        policy.to(device)
    bare = language_seconds if hasattr(policy, "generate") else denoising_seconds
    module = CATALOGUE[method.loop or method.name].module
    reward = free_set_reward if takes_sets(method, chosen.config) else free_reward
    if hasattr(method.module, "trial"):  # its data is more than prompts
        steps = method.module.trial(world, config, 0).steps
    else:
        steps = training(method, chosen, world, [reward], seed=0)
    measured, floors = [], []
    for step in steps(torch.Generator().manual_seed(0)):
        floor = bare(policy, world.prompts, **module.floor(policy, config, step.metrics))
        if step.number:  # the first round warms up
            measured.append(step.seconds)
            floors.append(floor)
    step_seconds, floor = statistics.median(measured), statistics.median(floors)
    return dict(
        method=method.name, world=world_name, device=device, step_seconds=round(step_seconds, 4),
        floor_seconds=round(floor, 4), ratio=round(step_seconds / floor, 3),
    )  # fmt: skip


def measured() -> list[str]:
    """The methods that say what a step of theirs cannot avoid, or bring a row of their own."""
    return [name for name, method in CATALOGUE.items() if has_floor(method) or hasattr(method.module, "bench")]


def has_floor(method: Method) -> bool:
    return hasattr(CATALOGUE[method.loop or method.name].module, "floor")


def worlds_for(method: Method, asked: list[str] | None, chosen: bool) -> list[str]:
    """Those of `asked` (None: the usual ones) in which the method runs. Raises UserError if a chosen one has none."""
    unknown = next((name for name in asked or () if name not in WORLDS), None)
    if unknown is not None:
        raise UserError(nearest("world", unknown, WORLDS))
    fit = [name for name in asked or BENCH_WORLDS if name in worlds_of(method)]
    if not fit and chosen and asked:
        policy_kind(method, asked[0])  # raises, and says which would do
    return fit or [method.world]


def command_bench(args) -> int:
    device, rows = find_device(args.device), []
    if args.out is not None:
        check_writable(args.out)
    for name in args.methods or measured():
        method = find_method(name)
        if name not in measured():
            raise UserError(nearest("method to measure", name, measured()))
        if hasattr(method.module, "bench"):  # no training step
            rows.append({"method": name, **method.module.bench(device)})
            print(f"{name}: {', '.join(f'{key} {value}' for key, value in rows[-1].items() if key != 'method')}")
            continue
        for world in worlds_for(method, args.worlds, bool(args.methods)):
            rows.append(bench_row(method, world, args.rounds, device))
            print(
                "{method} on {world} ({device}): step {step_seconds} s, floor {floor_seconds} s, ratio {ratio}".format(
                    **rows[-1]
                )
            )
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=2))
    return 0
