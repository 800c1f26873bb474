"""Chapter 51: right solutions as students write them."""

import torch


def reward_by_table(rewards, references, k):
    wins = (k * (rewards.unsqueeze(1) - references)).sigmoid()
    return wins.mean(1)


def reward_by_formula(rewards, references, k):
    odds = torch.exp(-k * (rewards[:, None] - references))
    return (1 / (1 + odds)).sum(1) / references.shape[1]


def reward_by_loop(rewards, references, k):
    shaped = []
    for reward, row in zip(rewards, references, strict=True):
        shaped.append(torch.sigmoid(k * (reward - row)).mean())
    return torch.stack(shaped)


def slope_by_table(rewards, references, k):
    wins = (k * (rewards.unsqueeze(1) - references)).sigmoid()
    return (k * wins * (1 - wins)).mean(1)


def slope_by_autograd(rewards, references, k):
    with torch.enable_grad():
        at = rewards.detach().clone().requires_grad_()
        shaped = (k * (at.unsqueeze(1) - references)).sigmoid().mean(1)
        return torch.autograd.grad(shaped.sum(), at)[0]


def slope_by_loop(rewards, references, k):
    slopes = []
    for i in range(len(rewards)):
        wins = torch.sigmoid(k * (rewards[i] - references[i]))
        slopes.append(k * (wins - wins**2).mean())
    return torch.stack(slopes)


def merge_by_share(count, mean, var, batch):
    total = count + len(batch)
    w = len(batch) / total
    gap = batch.mean() - mean
    within = (1 - w) * var + w * batch.var(correction=0)
    return total, mean + w * gap, within + w * (1 - w) * gap**2


def merge_by_moments(count, mean, var, batch):
    total = count + len(batch)
    new_mean = (count * mean + batch.sum()) / total
    squares = count * (var + mean**2) + (batch**2).sum()
    return total, new_mean, squares / total - new_mean**2


def merge_by_deviations(count, mean, var, batch):
    n = len(batch)
    total = count + n
    gap = batch.mean() - mean
    squares = count * var + ((batch - batch.mean()) ** 2).sum() + count * n / total * gap**2
    return total, mean + n / total * gap, squares / total


def kl_by_log_softmax(prior, shaped, beta):
    log_prob = (prior.log() + shaped / beta).log_softmax(0)
    return (log_prob.exp() * (log_prob - prior.log())).sum()


def kl_by_log_z(prior, shaped, beta):
    log_z = torch.logsumexp(prior.log() + shaped / beta, 0)
    law = prior * (shaped / beta - log_z).exp()
    return (law * shaped).sum() / beta - log_z


def kl_by_largest(prior, shaped, beta):
    tilted = prior * ((shaped - shaped.max()) / beta).exp()
    law = tilted / tilted.sum()
    return (torch.xlogy(law, law) - torch.xlogy(law, prior)).sum()


def batch_by_rows(rewards, prompts, references, k):
    rows = torch.stack([references[prompt] for prompt in prompts])
    return (k * (rewards.unsqueeze(1) - rows)).sigmoid().mean(1)


def batch_by_loop(rewards, prompts, references, k):
    shaped = []
    for reward, prompt in zip(rewards, prompts, strict=True):
        shaped.append((k * (reward - references[prompt])).sigmoid().mean())
    return torch.stack(shaped)


FORMS = {
    "51/par_reward": [reward_by_table, reward_by_formula, reward_by_loop],
    "51/par_slope": [slope_by_table, slope_by_autograd, slope_by_loop],
    "51/merge": [merge_by_share, merge_by_moments, merge_by_deviations],
    "51/optimum_kl": [kl_by_log_softmax, kl_by_log_z, kl_by_largest],
    "51/shape_batch": [batch_by_rows, batch_by_loop],
}
