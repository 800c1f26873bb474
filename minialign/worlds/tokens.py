"""`tokens`: six words, short responses, each of them listed: what a language policy should reach is here a table.

    load()                        four prompts, 4 words, 1,296 responses each; the proxy likes word 5 too much (PAR)
    load("overoptimisation")      one prompt, 6 words, 46,656 responses; proxies fitted to comparisons (Gao et al.)
    load("constrained")           one prompt, 4 words; two correlated rewards, each worth having up to a point
    load("bigrams")               four prompts, 4 words; gold is a sum over words and pairs of neighbours (RAFT)
    load(model="transformer")     the same with a random two-layer GPT-2 for a base model instead of a table

    world.exact                   `Enumerated`: every response, its log-probability under the base, gold, proxies
    PrefixTree                    a language model that is a table, or a critic that is one: 6 logits a prefix
    all_log_probs                 the law over all responses of any causal language model
    best_of_n_curve, tilt_to_kl   gold and proxy of the best of n, and of the tilt at a given KL, without sampling

The gold reward has an inverted U in the number of 5s (think of a polite phrase: one is good, four are not). A proxy
that has the slope right where the base model lives extrapolates it, and optimising it too hard makes gold fall.
Sheets: ppo_rlhf (Gao, Schulman and Hilton, 2022, arXiv 2210.10760), par (Fu et al., 2025, arXiv 2502.18770), raft and
constrained (Moskovitz et al., 2023, arXiv 2310.04373).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, one_hot

from minialign import exact
from minialign.worlds.base import LanguageWorld
from minialign.worlds.tokens_models import (
    SPECIAL,
    VOCABULARY,
    PrefixTree,
    all_log_probs,
    enumerate_responses,
    index_of,
    num_prefixes,
    random_transformer,
    tokenizer,
)

# Rewards ------------------------------------------------------------------------------------------------------------


@dataclass
class Enumerated:
    """A world in tables: `responses` (n, length); for each prompt and response log pi_ref, the gold reward, proxies.

    All tables (prompts, n), float64. `network` is the base model that pi_ref belongs to.
    """

    responses: Int[Tensor, "n length"]
    log_prob_ref: Float[Tensor, "prompts n"]
    gold: Float[Tensor, "prompts n"]
    proxies: dict[str, Float[Tensor, "prompts n"]]
    network: nn.Module
    prompts: list[str] = field(init=False)

    def __post_init__(self):
        self.prompts = [f"p{i}" for i in range(len(self.gold))]

    @property
    def length(self) -> int:
        return self.responses.shape[1]

    def log_probs(self, network: nn.Module) -> Float[Tensor, "prompts n"]:
        """The law of a trained network over all responses, float64: for exact KL, gold, proxy."""
        with torch.no_grad():
            if isinstance(network, PrefixTree):
                return network.all_log_probs().double()
            return all_log_probs(network, len(self.prompts), self.length).double()

    def mean(self, log_probs: Float[Tensor, "prompts n"], table: Float[Tensor, "prompts n"]) -> float:
        """Expectation of `table` under `log_probs`, prompts equally likely."""
        return float((log_probs.exp() * table).sum(-1).mean())

    def kl(self, log_probs: Float[Tensor, "prompts n"], other: Float[Tensor, "prompts n"] | None = None) -> float:
        """KL(pi || other) in nats, pi_ref if None, mean over prompts."""
        return float(exact.discrete_kl(log_probs, self.log_prob_ref if other is None else other).mean())

    def look_up(self, table: Float[Tensor, "prompts n"]) -> Callable:
        """`table` as a reward: texts like "0 5 2 1", or word numbers (b, length), and prompts -> (b,), float32."""

        def reward(samples, prompts: Sequence[str]) -> Float32[Tensor, "b"]:
            rows = torch.tensor([self._prompt(prompt) for prompt in prompts], dtype=torch.long)
            words = samples if isinstance(samples, Tensor) else read(samples, self.length)
            columns = index_of(words)
            return table[rows.to(columns.device), columns].float()

        return reward

    def _prompt(self, prompt: str) -> int:
        if prompt not in self.prompts:
            raise ValueError(f"unknown prompt {prompt!r}. There are: {', '.join(self.prompts)}.")
        return self.prompts.index(prompt)


def read(texts: Sequence[str], length: int) -> Int[Tensor, "b length"]:
    """The word numbers of texts like "0 5 2 1". Raises ValueError for any other word or number of words."""
    rows = [text.split() for text in texts]
    for i, row in enumerate(rows):
        if len(row) != length or any(not word.isdigit() or int(word) >= VOCABULARY for word in row):
            raise ValueError(f"samples[{i}] is {texts[i]!r}; expected {length} words of 0 to {VOCABULARY - 1}.")
    return torch.tensor([[int(word) for word in row] for row in rows], dtype=torch.long).view(-1, length)


def standardise(values: Float[Tensor, "*batch n"], log_prob: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """Shifted and scaled to mean 0, variance 1 under a law over the last axis."""
    prob = log_prob.exp()
    centred = values - (prob * values).sum(-1, keepdim=True)
    return centred / (prob * centred**2).sum(-1, keepdim=True).sqrt()


def features(responses: Int[Tensor, "n length"], bigrams: bool = False) -> Float[Tensor, "n k"]:
    """What a reward model looks at: which word stands where (6 x length), and how often each pair of neighbours occurs.

    The first alone is the "small" reward model of the sheet, both together the "large" one.
    """
    words = one_hot(responses, VOCABULARY).double()
    if not bigrams:
        return words.flatten(1)
    pairs = torch.einsum("nti,ntj->nij", words[:, :-1], words[:, 1:])
    return torch.cat([words.flatten(1), pairs.flatten(1)], 1)


def comparisons(
    log_prob: Float[Tensor, "n"],
    gold: Float[Tensor, "n"],
    num_pairs: int,
    generator: torch.Generator,
    noise: float = 0.0,
) -> tuple[Int[Tensor, "pairs"], Int[Tensor, "pairs"]]:
    """(chosen, rejected): rows of responses drawn from `log_prob`; the one with more gold is chosen.

    noise: share of pairs, drawn at random, whose label is turned round. Of equal gold the first is chosen.
    """
    if not 0 <= noise <= 1:
        raise ValueError(f"noise is {noise}; expected the share of wrong labels, 0 to 1.")
    first, second = torch.multinomial(log_prob.exp(), 2 * num_pairs, replacement=True, generator=generator).view(2, -1)
    wins = gold[first] >= gold[second]
    wins ^= torch.rand(num_pairs, generator=generator) < noise
    return torch.where(wins, first, second), torch.where(wins, second, first)


def fit_bradley_terry(
    inputs: Float[Tensor, "n k"], chosen: Int[Tensor, "pairs"], rejected: Int[Tensor, "pairs"], l2: float = 1e-3
) -> Float[Tensor, "n"]:
    """Scores of all n responses: logistic regression on differences of features, by L-BFGS; + l2 |weights|^2."""
    difference = inputs[chosen] - inputs[rejected]
    weights = torch.zeros(inputs.shape[1], dtype=inputs.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -logsigmoid(difference @ weights).mean() + l2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return inputs @ weights.detach()


# Exact curves -------------------------------------------------------------------------------------------------------


def best_of_n_curve(
    log_prob_ref: Float[Tensor, "n"], proxy: Float[Tensor, "n"], gold: Float[Tensor, "n"], numbers: Sequence[int]
) -> exact.Frontier:
    """Exact KL, proxy and gold of the best of n by proxy, an entry for each of `numbers`."""
    laws = [exact.best_of_n(log_prob_ref, proxy, n) for n in numbers]
    probs = torch.stack([law.log_prob.exp() for law in laws])
    return exact.Frontier(torch.stack([law.kl for law in laws]).clamp_min(0), probs @ proxy, probs @ gold)


def tilt_to_kl(
    log_prob_ref: Float[Tensor, "*batch n"], reward: Float[Tensor, "*#batch n"], kl: float
) -> Float[Tensor, "*batch n"]:
    """log of pi_ref exp(t reward) / Z with t > 0 such that KL(pi || pi_ref) = kl nats, each row its own t.

    Found by bisection on log t, over 26 decades round the reward's spread. Raises ValueError where no tilt gets so far:
    the limit is -log of pi_ref's mass on the best responses.
    """
    span = (reward.amax(-1) - reward.amin(-1)).clamp_min(1e-300)
    low, high = -13 * torch.ones_like(span), 13 * torch.ones_like(span)  # log10 of t times the span
    best = reward == reward.amax(-1, keepdim=True)
    limit = -torch.where(best, log_prob_ref, -torch.inf).logsumexp(-1)
    if not 0 < kl < limit.min():
        raise ValueError(f"kl is {kl}; expected more than 0 and less than {float(limit.min()):.4f}, the best one's.")
    for _ in range(60):
        middle = (low + high) / 2
        log_prob = (log_prob_ref + (10**middle / span).unsqueeze(-1) * reward).log_softmax(-1)
        short = exact.discrete_kl(log_prob, log_prob_ref) < kl
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return log_prob


# The worlds ---------------------------------------------------------------------------------------------------------


def _normal(generator: torch.Generator, *shape: int) -> Float[Tensor, "*shape"]:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _base(model: str, logits: Tensor, length: int, seed: int, spread: float, lowered: float) -> nn.Module:
    if model == "table":
        return PrefixTree(logits)
    if model == "transformer":
        return random_transformer(len(logits), length, seed, spread, lowered)
    raise ValueError(f"unknown model {model!r} of world 'tokens'. There are: table, transformer.")


def padding(seed: int = 0, model: str = "table", *, num_prompts: int = 4, length: int = 4) -> Enumerated:
    """Sheet par: quality q and c, the number of 5s; gold q + c / 2 - c^2 / 2, proxy q + 1.5 c + noise + an offset.

    The proxy has gold's slope from no 5 to one about right, and goes on. Base logits N(0, .7^2) a prefix, that of word
    5 lowered by .7. q = N(0, 1) / 2 a response + half the sum of a weight N(0, 1) for each word at each position.
    Gold is standardised under the base, prompt by prompt; the proxy's offset, N(0, 2^2) a prompt, means nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    responses = enumerate_responses(length)
    logits = 0.7 * _normal(generator, num_prompts, num_prefixes(length), VOCABULARY)
    logits[..., SPECIAL] -= 0.7
    network = _base(model, logits, length, seed, 0.7, 0.7)
    weights = _normal(generator, num_prompts, length * VOCABULARY)
    quality = (_normal(generator, num_prompts, len(responses)) + weights @ features(responses).T) / 2
    noise, offset = _normal(generator, num_prompts, len(responses)), _normal(generator, num_prompts, 1)
    count = (responses == SPECIAL).sum(1).double()
    gold = quality + 0.5 * count - 0.5 * count**2
    world = Enumerated(responses, torch.zeros_like(gold), gold, {}, network)
    world.log_prob_ref = world.log_probs(network)
    world.gold = standardise(world.gold, world.log_prob_ref)
    world.proxies["proxy"] = quality + 1.5 * count + 0.3 * noise + 2 * offset
    return world


def overoptimisation(
    seed: int = 0,
    model: str = "table",
    *,
    length: int = 6,
    num_comparisons: int = 5000,
    noise: float = 0.0,
    inverted_u: bool = True,
) -> Enumerated:
    """Sheet ppo_rlhf: gold = a random tanh network + 2 (c - .3 c^2), c the number of 5s; proxies fitted to comparisons.

    "small" sees which word stands where, "large" pairs of neighbours as well. Base: independent positions, logits
    N(0, .5^2), that of word 5 lowered by .8. Gold and proxies have mean 0, variance 1 under the base.
    inverted_u=False leaves the network alone: then selecting noise costs something, but nothing turns down.
    """
    generator = torch.Generator().manual_seed(seed)
    responses = enumerate_responses(length)
    position = 0.5 * _normal(generator, length, VOCABULARY)
    position[:, SPECIAL] -= 0.8
    levels = [position[i].expand(VOCABULARY**i, VOCABULARY) for i in range(length)]
    network = _base(model, torch.cat(levels).unsqueeze(0), length, seed, 0.5, 0.8)
    hidden = torch.tanh(
        features(responses) @ (0.5 * _normal(generator, length * VOCABULARY, 32)) + 0.5 * _normal(generator, 32)
    )
    count = (responses == SPECIAL).sum(1).double()
    gold = (hidden @ _normal(generator, 32)).unsqueeze(0)
    world = Enumerated(responses, torch.zeros_like(gold), gold, {}, network)
    world.log_prob_ref = world.log_probs(network)
    world.gold = standardise(world.gold, world.log_prob_ref)
    if inverted_u:
        world.gold = standardise(world.gold + 2 * (count - 0.3 * count**2), world.log_prob_ref)
    pairs = comparisons(world.log_prob_ref[0], world.gold[0], num_comparisons, generator, noise)
    for name, bigrams in (("small", False), ("large", True)):
        scores = fit_bradley_terry(features(responses, bigrams), *pairs)
        world.proxies[name] = standardise(scores.unsqueeze(0), world.log_prob_ref)
    return world


def constrained(seed: int = 0, model: str = "table", *, length: int = 4, raised: float = 0.0) -> Enumerated:
    """Sheet constrained: proxies "fives" = a + noise and "fours" = .7 b + .3 a + noise, correlated through a.

    a, b: share of 5s and of 4s in a response; noise .03 N(0, 1), drawn once a response. Base logits N(0, .5^2) a
    prefix, those of words 4 and 5 changed by raised - .4 (a random transformer: of word 5 alone). Gold is quadratic PER
    RESPONSE, -((fives - .5) / .2)^2 / 2 - ((fours - .4) / .15)^2 / 2; the paper's evaluation is one of the corpus, the
    same of the proxies' means, minus .2 KL. `raised` moves the reference alone: one seed keeps its proxies.
    """
    generator = torch.Generator().manual_seed(seed)
    responses = enumerate_responses(length)
    logits = 0.5 * _normal(generator, 1, num_prefixes(length), VOCABULARY)
    logits[..., SPECIAL - 1 :] += raised - 0.4
    network = _base(model, logits, length, seed, 0.5, 0.4 - raised)
    five, four = ((responses == word).double().mean(1) for word in (SPECIAL, SPECIAL - 1))
    noise = 0.03 * _normal(generator, 2, 1, len(responses))
    proxies = {"fives": five + noise[0], "fours": 0.7 * four + 0.3 * five + noise[1]}
    gold = -(((proxies["fives"] - 0.5) / 0.2) ** 2) / 2 - ((proxies["fours"] - 0.4) / 0.15) ** 2 / 2
    world = Enumerated(responses, torch.zeros_like(gold), gold, proxies, network)
    world.log_prob_ref = world.log_probs(network)
    return world


def bigrams(seed: int = 0, model: str = "table", *, num_prompts: int = 4, length: int = 4) -> Enumerated:
    """Sheet raft: gold = a weight for each word at each position + one for each pair of neighbours, all N(0, 1).

    Base logits N(0, .7^2) a prefix. Gold is standardised under the base, prompt by prompt. There is no proxy.
    """
    generator = torch.Generator().manual_seed(seed)
    responses = enumerate_responses(length)
    logits = 0.7 * _normal(generator, num_prompts, num_prefixes(length), VOCABULARY)
    network = _base(model, logits, length, seed, 0.7, 0.0)
    looked_at = features(responses, bigrams=True)
    gold = _normal(generator, num_prompts, looked_at.shape[1]) @ looked_at.T
    world = Enumerated(responses, torch.zeros_like(gold), gold, {}, network)
    world.log_prob_ref = world.log_probs(network)
    world.gold = standardise(gold, world.log_prob_ref)
    return world


def unstructured(
    error: str, num_responses: int = 1296, seed: int = 0, num_references: int = 10
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"], Float[Tensor, "n"], Float[Tensor, "m"]]:
    """(log pi_ref, gold, proxy, proxies of M references): responses without structure, all equally likely (sheet par).

    gold N(0, 1); the proxy's error: "normal" .7 N(0, 1); "student" .7 times Student's t with 2 degrees of freedom;
    "exploit": none, but for one response in a hundred, where gold is -2 and the proxy says 6.
    """
    generator = torch.Generator().manual_seed(seed)
    gold = _normal(generator, num_responses)
    if error == "normal":
        proxy = gold + 0.7 * _normal(generator, num_responses)
    elif error == "student":
        chi2 = -2 * torch.log1p(-torch.rand(num_responses, generator=generator, dtype=torch.float64))  # 2 d.o.f.
        proxy = gold + 0.7 * _normal(generator, num_responses) / (chi2 / 2).sqrt()
    elif error == "exploit":
        found = torch.rand(num_responses, generator=generator) < 0.01
        gold = torch.where(found, -2.0, gold)
        proxy = torch.where(found, 6.0, gold)
    else:
        raise ValueError(f"unknown error {error!r}. There are: exploit, normal, student.")
    log_prob_ref = torch.full_like(gold, 1 / num_responses).log()
    return log_prob_ref, gold, proxy, proxy[torch.randint(num_responses, (num_references,), generator=generator)]


@dataclass(kw_only=True)
class TokensWorld(LanguageWorld):
    """Every response listed: `exact` has their log-probabilities, gold and proxy rewards."""

    exact: Enumerated


KINDS = {
    "padding": padding, "overoptimisation": overoptimisation, "constrained": constrained, "bigrams": bigrams,
}  # fmt: skip


def load(kind: str = "padding", *, seed: int = 0, model: str = "table", **settings) -> TokensWorld:
    """The enumerable world, on the CPU: a policy whose responses are always `length` words, without EOS.

    kind "padding" (settings num_prompts, length), "overoptimisation" (length, num_comparisons, noise, inverted_u),
    "constrained" (length, raised) or "bigrams" (num_prompts, length).
    model "table" or "transformer". Rewards: "gold" and the proxies; the oracle is gold, not 0 or 1.
    `exact` is the `Enumerated`; `num_tokens` the responses' length; `critic(num_heads)` a table of zeros for
    `policy.add_value_heads(network=...)`.
    """
    from minialign.policies.language import LanguagePolicy

    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of world 'tokens'. There are: {', '.join(KINDS)}.")
    world = KINDS[kind](seed, model, **settings)
    policy = LanguagePolicy(world.network.requires_grad_(False), tokenizer(len(world.prompts)), fixed_length=True)
    rewards = {name: world.look_up(table) for name, table in ({"gold": world.gold} | world.proxies).items()}
    for name, reward in rewards.items():
        reward.__name__ = name
    return TokensWorld(
        name="tokens",
        policies={"language": lambda: policy},
        prompts=list(world.prompts),
        rewards=rewards,
        default_reward=next(iter(world.proxies), "gold"),
        oracle=rewards["gold"],
        real=functools.partial(_draw, world),
        show=lambda samples, prompts, title=None: text_figure(
            samples, prompts, rewards["gold"](samples, prompts), title
        ),
        oracle_scale="points",
        exact=world,
        num_tokens=world.length,
        critic=lambda num_heads=1: PrefixTree(torch.zeros(len(world.prompts), num_prefixes(world.length), num_heads)),
    )


def _draw(world: Enumerated, n: int, generator: torch.Generator | None = None) -> tuple[list[str], list[str]]:
    """n responses of the base model, as texts, and their prompts in turn."""
    rows = torch.arange(n) % len(world.prompts)
    drawn = torch.multinomial(world.log_prob_ref.exp()[rows], 1, generator=generator)[:, 0]
    texts = [" ".join(map(str, words)) for words in world.responses[drawn].tolist()]
    return texts, [world.prompts[row] for row in rows]


def text_figure(samples: Sequence[str], prompts: Sequence[str], scores: Tensor, title: str | None = None):
    """Texts one below the other, each with its prompt and score; -> Figure."""
    from matplotlib.figure import Figure

    lines = [
        f"{score:+5.1f}   {prompt}  {text}"
        for text, prompt, score in zip(samples, prompts, scores.tolist(), strict=True)
    ]
    fig = Figure(figsize=(10, 0.25 * len(lines) + 0.5))
    if title:
        fig.suptitle(title, x=0.01, ha="left")
    for i, line in enumerate(lines):
        fig.text(0.01, 1 - (i + 1.2) / (len(lines) + 1), line, family="monospace", fontsize=8)
    return fig
