"""What suits which method in which world: data, no code. A minute or two on two cores each.

Everything else is the method's own default; every field can be overridden with `minialign run NAME --set`. A method
that trains runs in every world with its kind of policy, recipe or not; one that does something else needs more than a
policy (data as the policy's states, preferences), and runs where it has a recipe.
"""

# How a world's policies are sampled, by kind, and what is trained of them; lora_rank 0 or none: all weights. A
# consistency policy that a world does not ship is distilled first.
WORLDS = {
    "shapes": {
        "diffusion": dict(num_steps=6, eta=1.0, guidance_scale=1.0, lora_rank=16),
        "consistency": dict(num_steps=4, guidance_scale=2.5, lora_rank=16),
        "flow": dict(num_steps=8, noise_level=0.7, guidance_scale=1.0, lora_rank=16),
    },
    "digits": {
        "diffusion": dict(num_steps=10, eta=1.0, guidance_scale=1.0, lora_rank=16),
        "consistency": dict(num_steps=4, lora_rank=16),
        "flow": dict(num_steps=10, noise_level=0.7, guidance_scale=1.0, lora_rank=16),
    },
    "compass": {
        "diffusion": dict(num_steps=20, eta=1.0),
        "consistency": dict(num_steps=4),
        "flow": dict(num_steps=10, noise_level=0.7),
    },
    "ring": {
        "diffusion": dict(num_steps=20, eta=1.0),
        "consistency": dict(num_steps=4),
        "flow": dict(num_steps=10, noise_level=0.7),
    },
    "crowd": {"diffusion": dict(num_steps=10, eta=1.0)},
    "line": {
        "diffusion": dict(num_steps=20, eta=1.0),
        "consistency": dict(num_steps=4),
        "flow": dict(num_steps=10, noise_level=0.7),
    },
    "assistant": {"language": dict(lora_rank=0)},
    "tokens": {"language": dict(lora_rank=0, kind="padding")},
}
# What methods that learn from pairs are given: so many of the base model's samples, two a prompt, labelled by a reward:
# "reward" says which has more of it, "bradley_terry" errs as people do, at scale label_scale. Ties are left out.
PAIRS = {
    "shapes": dict(num_pairs=1024, labels="reward", label_scale=1.0),
    "digits": dict(num_pairs=1024, labels="reward", label_scale=1.0),
    "compass": dict(num_pairs=2000, labels="bradley_terry", label_scale=4.0),
    "ring": dict(num_pairs=2000, labels="bradley_terry", label_scale=1.0),
    "crowd": dict(num_pairs=2000, labels="bradley_terry", label_scale=1.0),
    "line": dict(num_pairs=2000, labels="bradley_terry", label_scale=1.0),
}
BENCH_WORLDS = ("shapes", "digits", "assistant")

B2_SMALL = dict(num_prompts=26, num_minibatches=2, num_epochs=1, steps_per_pass=6)
B2_EXACT = dict(
    num_iterations=36, num_prompts=52, first_window=4, clip_range=0.1, learning_rate=1e-2, steps_per_pass=20
)
FIND_EXACT = dict(group_size=16, reduction="sum", beta=0.02, learning_rate=0.05)
# plain sums of the rewards to come, whitened over the round, move a table best
TABLE = dict(num_tokens=4, num_epochs=1, gae_lambda=1.0, learning_rate=0.03)
GRPO_EXACT = dict(num_iterations=40, num_prompts=12, learning_rate=3e-3, steps_per_pass=9)
NFT_EXACT = dict(num_iterations=40, num_prompts=12, learning_rate=3e-3, levels_per_pass=9)
# beta of sums over the plane's two axes, and no clip
PSO_EXACT = dict(
    num_iterations=60, batch_size=256, pairs_per_pass=256, beta=1.0, reduction="sum", clip_range=float("inf")
)
RAFT_PICTURES = dict(
    num_iterations=4, num_prompts=96, keep_winners=0.8, num_epochs=16, learning_rate=2e-3, final_lr_fraction=0.0
)
RAFT_EXACT = dict(num_iterations=6, num_epochs=60, rows_per_pass=256, learning_rate=3e-3)
DPO_EXACT = dict(num_iterations=300, batch_size=256, pairs_per_pass=256)
INPO_PICTURES = dict(num_iterations=60, pairs_per_pass=32)
INPO_EXACT = dict(num_iterations=200, batch_size=256, pairs_per_pass=256, beta=60.0, learning_rate=1e-3)
SMPO_EXACT = dict(labels="reward", batch_size=256, pairs_per_pass=256, beta=120.0, learning_rate=1e-3)
SWAPS = dict(selection="distribution", learning_rate=5e-4)
RECIPES = {
    ("ddpo", "shapes"): dict(num_iterations=50, learning_rate=3e-3, warmup_updates=10, steps_per_pass=6),
    ("ddpo", "digits"): dict(num_iterations=16, learning_rate=1e-3, steps_per_pass=5),
    ("ddpo", "compass"): dict(num_iterations=40, num_prompts=256, group_size=1, num_minibatches=4, learning_rate=3e-3),
    ("ddpo", "ring"): dict(num_iterations=40, num_prompts=256, group_size=1, num_minibatches=4, learning_rate=3e-3),
    ("ddpo", "line"): dict(num_iterations=40, num_prompts=256, group_size=1, num_minibatches=4, learning_rate=3e-3),
    # relations are settled by the first steps, so on shapes the window is the whole run; see tests/claims
    ("b2diffurl", "shapes"): B2_SMALL | dict(num_iterations=50, first_window=6, learning_rate=3e-3, warmup_updates=10),
    ("b2diffurl", "digits"): B2_SMALL | dict(num_iterations=32, first_window=4, learning_rate=1e-3),
    ("b2diffurl", "compass"): B2_EXACT | dict(last_window=10),
    ("b2diffurl", "ring"): B2_EXACT,
    ("b2diffurl", "line"): B2_EXACT,
    ("rlcm", "shapes"): dict(num_iterations=36, learning_rate=2e-3, final_lr_fraction=0.1, warmup_updates=20),
    ("rlcm", "digits"): dict(num_iterations=32, learning_rate=1e-3, num_minibatches=2),
    ("rlcm", "compass"): dict(num_iterations=40, num_prompts=256, group_size=1, learning_rate=1e-3, clip_range=0.1),
    ("rlcm", "ring"): dict(num_iterations=40, num_prompts=256, group_size=1, learning_rate=1e-3, clip_range=0.1),
    # with more steps it goes on past what can be read
    ("d3po", "digits"): dict(
        num_iterations=11, num_prompts=64, num_minibatches=2, learning_rate=5e-4, steps_per_pass=5
    ),
    ("d3po", "shapes"): dict(
        num_iterations=30, num_prompts=64, num_minibatches=1, learning_rate=1e-3, warmup_updates=5, steps_per_pass=6
    ),
    # one step a round: several walk past the clip (see tests/claims)
    ("d3po", "compass"): dict(num_prompts=128, num_minibatches=1, learning_rate=3e-3, steps_per_pass=20),
    ("d3po", "ring"): dict(num_prompts=64, num_minibatches=1, learning_rate=1e-3, steps_per_pass=20),
    ("d3po", "line"): dict(num_prompts=64, num_minibatches=1, learning_rate=3e-2, steps_per_pass=20),
    # none for shapes: at four settings, 15 to 25 rounds, two minutes each, its 0/1 oracle did not rise
    ("prdp", "digits"): dict(num_iterations=24, num_updates=2, beta=0.005, clip_range=0.2, learning_rate=1e-3),
    ("prdp", "crowd"): dict(num_iterations=60, beta=0.5, learning_rate=1e-3, weight_decay=0.0, prompts_per_pass=16),
    # none for shapes: most pairs tie under its 0/1 oracle, and at 4e-3, 14 rounds, it fell to 0
    ("pso", "digits"): dict(num_iterations=16, num_minibatches=2, learning_rate=5e-4),
    ("pso", "compass"): PSO_EXACT,
    ("pso", "ring"): PSO_EXACT,
    ("rwr", "shapes"): dict(num_iterations=5, batch_size=1024, num_updates=60, minibatch_size=128),
    ("rwr", "digits"): dict(num_iterations=5, batch_size=1024, num_updates=60, minibatch_size=128),
    ("grpo", "shapes"): dict(num_iterations=40, num_prompts=8, learning_rate=3e-3, warmup_updates=10, steps_per_pass=7),
    ("grpo", "digits"): dict(num_iterations=30, num_prompts=8, learning_rate=1e-3, steps_per_pass=9),
    ("grpo", "compass"): GRPO_EXACT,
    ("grpo", "ring"): GRPO_EXACT,
    ("grpo", "line"): GRPO_EXACT,
    ("diffusion_nft", "shapes"): dict(num_iterations=30, num_prompts=8, learning_rate=3e-3, levels_per_pass=7),
    ("diffusion_nft", "digits"): dict(num_iterations=30, num_prompts=8, learning_rate=1e-3, levels_per_pass=9),
    ("diffusion_nft", "compass"): NFT_EXACT,
    ("diffusion_nft", "ring"): NFT_EXACT,
    ("diffusion_nft", "line"): NFT_EXACT,
    ("raft", "tokens"): dict(
        kind="bigrams", num_iterations=4, num_tokens=4, num_epochs=30, num_minibatches=1, rows_per_pass=256,
        learning_rate=0.1,
    ),
    ("raft", "assistant"): dict(num_iterations=10, num_prompts=128),
    ("raft", "shapes"): RAFT_PICTURES,
    ("raft", "digits"): RAFT_PICTURES,
    ("raft", "compass"): RAFT_EXACT,
    ("raft", "ring"): RAFT_EXACT,
    ("raft", "line"): RAFT_EXACT,
    # eta 0: then the noise decides the whole sample
    ("find_noise", "shapes"): dict(num_iterations=50, eta=0.0),
    ("find_noise", "digits"): dict(num_iterations=40, eta=0.0),
    ("find_noise", "compass"): dict(num_iterations=60, eta=0.0, **FIND_EXACT),
    ("find_noise", "ring"): dict(num_iterations=60, eta=0.0, **FIND_EXACT),
    ("find_noise", "line"): dict(num_iterations=60, eta=0.0, **FIND_EXACT),
    ("inpo", "digits"): INPO_PICTURES | dict(batch_size=64, pairs_per_pass=64, beta=600.0, learning_rate=3e-4),
    ("inpo", "shapes"): INPO_PICTURES | dict(batch_size=32, beta=1000.0, learning_rate=1e-3, num_inversion_steps=3),
    ("inpo", "compass"): INPO_EXACT,
    ("inpo", "ring"): INPO_EXACT,
    # beta, of errors that are summed: some 220 a pixel, whatever the number of pixels
    ("dragon", "digits"): SWAPS | dict(num_iterations=8, num_prompts=96, num_updates=8, minibatch_size=64, beta=3.5),
    ("dragon", "shapes"): SWAPS | dict(num_iterations=6, num_prompts=32, num_updates=5, minibatch_size=24, beta=0.9),
    ("dragon", "compass"): SWAPS | dict(num_iterations=16, beta=10.0, learning_rate=1e-3),
    ("dragon", "ring"): SWAPS | dict(num_iterations=16, beta=10.0, learning_rate=1e-3),
    # beta is of errors averaged over the elements: 256, 64 and 2 of them
    ("diffusion_dpo", "shapes"): dict(
        num_iterations=80, batch_size=64, pairs_per_pass=64, beta=1000.0, learning_rate=1e-3
    ),
    ("diffusion_dpo", "digits"): dict(
        num_iterations=60, batch_size=64, pairs_per_pass=64, beta=1500.0, learning_rate=5e-4
    ),
    ("diffusion_dpo", "compass"): DPO_EXACT | dict(beta=5.0, learning_rate=3e-3),
    ("diffusion_dpo", "ring"): DPO_EXACT | dict(beta=10.0, learning_rate=2e-3),
    # weights need scores that do not contradict the labels, so people's are not offered
    ("smpo", "digits"): dict(num_iterations=60, batch_size=64, beta=2000.0, num_inversion_steps=3, learning_rate=3e-4),
    ("smpo", "shapes"): dict(
        num_iterations=40, num_pairs=512, batch_size=32, beta=4000.0, num_inversion_steps=2, learning_rate=3e-4
    ),
    ("smpo", "compass"): SMPO_EXACT | dict(beta=20.0),
    ("smpo", "ring"): SMPO_EXACT,
    ("smpo", "line"): SMPO_EXACT,
    ("smpo", "crowd"): SMPO_EXACT | dict(beta=500.0, learning_rate=3e-4),
    ("ppo", "assistant"): dict(num_iterations=120, learning_rate=3e-4),
    ("ppo", "tokens"): TABLE | dict(num_iterations=200),
    ("par", "assistant"): dict(num_iterations=120, learning_rate=3e-4, beta=0.01),
    ("par", "tokens"): TABLE | dict(num_iterations=200),
    ("constrained", "assistant"): dict(
        thresholds=(0.8, 1.0), num_iterations=60, num_prompts=64, num_epochs=4, learning_rate=3e-4, max_grad_norm=1.0
    ),
    ("constrained", "tokens"): dict(
        thresholds=(0.5, 0.4), num_iterations=300, num_tokens=4, baseline="batch", gae_lambda=1.0, learning_rate=0.02,
        rows_per_pass=128, max_grad_norm=1e9, kind="constrained",
    ),
    ("consistency_distillation", "digits"): dict(num_iterations=800, batch_size=64, learning_rate=1e-3),
    ("consistency_distillation", "compass"): dict(num_iterations=4000, batch_size=256),
    ("consistency_distillation", "ring"): dict(num_iterations=4000, batch_size=256),
    ("consistency_distillation", "line"): dict(num_iterations=1000, batch_size=256),
    ("rpo_subject", "shapes"): dict(
        num_iterations=120, batch_size=8, validate_every=15, samples_per_prompt=3, learning_rate=3e-4, label_scale=0.1,
        num_steps=12,
    ),
    ("reward_model", "assistant"): dict(),
    ("teleport", "digits"): dict(),
    ("teleport", "compass"): dict(),
    ("teleport", "ring"): dict(),
    ("teleport", "line"): dict(),
}  # fmt: skip

# Rewards to train on, where they are not the world's default.
REWARDS = {
    ("d3po", "shapes"): ("graded",),  # of two that are wrong, one is less so: fewer ties
    ("find_noise", "ring"): ("on_mode",),
    ("smpo", "compass"): ("styled_gold",),  # scores of many sizes; gold and the oracles are 0 or 1
    ("smpo", "shapes"): ("graded",),
    ("par", "assistant"): ("courtesies",),
    ("constrained", "assistant"): ("right", "courtesies"),
    ("constrained", "tokens"): ("fives", "fours"),
}
