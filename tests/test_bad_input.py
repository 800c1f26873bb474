"""Bad input, as users give it: every line is refused by name, before anything is spent, and nothing trains."""

import contextlib
import io
import re
import shlex
import signal
from pathlib import Path

import jaxtyping
import pytest
import torch

from minialign import cli, kernels, loop, measure, rewards, statistics, worlds
from minialign.methods import CATALOGUE, b2diffurl, constrained, d3po, ddpo, par, ppo, prdp, rlcm, rwr
from minialign.settings import annotations, fits

FILES = {
    "afile": "x",
    "full/x": "x",
    "nb.ipynb": "{",
    "syntax.py": "def f(:\n",
    "raises.py": "1/0\n",
    "exits.py": "import sys; sys.exit(3)\n",
    "fine.py": "VALUE = 3\ndef one(x): return x\ndef kw(*, a): return a\nclass C: pass\n",
    "stops.py": (
        "def f(samples, prompts): raise SystemExit(4)\n"
        "def g(samples, prompts): return float('nan')\n"
        "def h(samples, prompts): return samples[:, 0].sqrt()\n"
    ),
}

# A command, and what is said of it. LONG is a name of 300 letters, NUL the character.
TABLE = r"""
run ddpo --steps 0  =>  argument --steps: '0' is not a whole number of at least 1.
run ddpo --steps -1  =>  argument --steps: '-1' is not a whole number of at least 1.
run ddpo --steps 1.5  =>  argument --steps: '1.5' is not a whole number of at least 1.
run ddpo --seed abc  =>  argument --seed: 'abc' is not a whole number of at least 0 and
run ddpo --seed -1 --world compass  =>  argument --seed: '-1' is not a whole number of at least 0 and
run ddpo --seed 99999999999999999999999 --world compass  =>  argument --seed: '99999999999999999999999' is not a who
run ddpo --world ""  =>  unknown world ''
run ddpo --set ""  =>  --set : expected field=value.
run ddpo --set =1  =>  unknown field ''
run ddpo --set learning_rate=  =>  --set learning_rate=: '' is not a finite number of at least 0.
run ddpo --set learning_rate=inf  =>  --set learning_rate=inf: 'inf' is not a finite number of at le
run ddpo --set num_steps=0  =>  --set num_steps=0: '0' is not a whole number of at least 1.
run ddpo --set num_steps=-3  =>  --set num_steps=-3: '-3' is not a whole number of at least 1.
run ddpo --set num_steps=2000 --world compass  =>  `num_inference_steps`: 2000 cannot be larger than `self.config
run ddpo --set eta=-1  =>  --set eta=-1: '-1' is not a finite number of at least 0 and at
run ddpo --set eta=5 --world compass --steps 1  =>  --set eta=5: '5' is not a finite number of at least 0 and at m
run ddpo --set lora_rank=-1  =>  --set lora_rank=-1: '-1' is not a whole number of at least 0.
run ddpo --set lora_rank=1.5  =>  --set lora_rank=1.5: '1.5' is not a whole number of at least 0
run ddpo --set guidance_scale=nan  =>  --set guidance_scale=nan: 'nan' is not a finite number of at l
run ddpo --set kind=cat --world compass  =>  unknown field 'kind'
run ddpo --set kind=  =>  unknown field 'kind'
run ddpo --set num_prompts=1e3  =>  --set num_prompts=1e3: '1e3' is not a whole number of at least
run ddpo --set group_size=0  =>  --set group_size=0: '0' is not a whole number of at least 1.
run ddpo --set clip_range=-1  =>  --set clip_range=-1: '-1' is not a number above 0 or None.
run ddpo --set clip_range=0  =>  --set clip_range=0: '0' is not a number above 0 or None.
run ddpo --set timestep_fraction=0  =>  --set timestep_fraction=0: '0' is not a finite number above 0
run ddpo --set timestep_fraction=2  =>  --set timestep_fraction=2: '2' is not a finite number above 0
run ddpo --set reduction=max  =>  --set reduction=max: 'max' is not one of 'mean', 'sum'.
run ddpo --set kl=fancy  =>  --set kl=fancy: 'fancy' is not one of 'exact', 'noise_mse'.
run ddpo --set learning_rate=1e30 --world compass --steps 3  =>  the gradient of update 2 is not finite. The likelie
run ddpo --set learning_rate=1e300 --world compass --steps 3  =>  --set learning_rate=1e300: '1e300' is not a finite
run ddpo --set warmup_updates=-1  =>  --set warmup_updates=-1: '-1' is not a whole number of at leas
run ddpo --set steps_per_pass=0  =>  --set steps_per_pass=0: '0' is not a whole number of at least
run ddpo --set num_minibatches=0  =>  --set num_minibatches=0: '0' is not a whole number of at least
run ddpo --world compass --reward ""  =>  unknown reward ''
run ddpo --world compass --reward :  =>  cannot load the reward ':': ValueError: Empty module name
run ddpo --world compass --reward a:  =>  cannot load the reward 'a:': ModuleNotFoundError: No module na
run ddpo --world compass --reward :f  =>  cannot load the reward ':f': ValueError: Empty module name
run ddpo --world compass --reward syntax:f  =>  cannot load the reward 'syntax:f': SyntaxError: invalid syntax
run ddpo --world compass --reward raises:f  =>  cannot load the reward 'raises:f': ZeroDivisionError: division
run ddpo --world compass --reward exits:f  =>  cannot load the reward 'exits:f': SystemExit: 3
run ddpo --world compass --reward fine:VALUE  =>  the reward 'fine:VALUE' is 3; expected a function of (samples,
run ddpo --world compass --reward fine:one  =>  reward 'one' raised TypeError: one() takes 1 positional argume
run ddpo --world compass --reward fine:kw  =>  reward 'kw' raised TypeError: kw() takes 0 positional argument
run ddpo --world compass --reward fine:C  =>  reward 'C' raised TypeError: C() takes no arguments. It was ca
run ddpo --world compass --reward fine:missing  =>  cannot load the reward 'fine:missing': AttributeError: module
run ddpo --world compass --reward stops:f  =>  reward 'f' raised SystemExit: 4. It was called with 512 sample
run ddpo --world compass --reward stops:g  =>  reward 'g' returned one number, nan, for 512 samples; expected
run ddpo --world compass --reward stops:h  =>  reward 'h' returned nan for 245 of 512 samples, first at index
run ddpo --world compass --reward fine.good  =>  unknown reward 'fine.good'
run ddpo --world compass --reward fine:good:x  =>  cannot load the reward 'fine:good:x': AttributeError: module '
run ddpo --world compass --reward gold,  =>  unknown reward ''
run ddpo --world compass --reward ,  =>  unknown reward ''
run ddpo --world compass --out afile  =>  --out afile: afile is a file; expected a folder.
run ddpo --world compass --out afile/x  =>  --out afile/x:
run ddpo --world compass --out full  =>  full already holds files. Go on with `minialign run --resume f
run ddpo --world compass --out ""  =>  argument --out: '' is no path.
run ddpo --world compass --out /proc/x  =>  cannot write to --out /proc/x: No such file or directory. Choo
run ddpo --world compass --out /dev/null  =>  --out /dev/null: /dev/null is a file; expected a folder.
run ddpo --world compass --out aNULb  =>  is no path
run ddpo --world compass --out LONG  =>  [Errno 36] File name too long: 'aaaaaaaaaaaaaa
run --resume ""  =>  argument --resume: '' is no path.
run --resume afile  =>  afile holds no run to resume: there is no such folder.
run --resume full  =>  full holds no run to resume (no run.json): start it with `mini
run --resume nowhere  =>  nowhere holds no run to resume: there is no such folder.
run --resume /dev/null  =>  /dev/null holds no run to resume: there is no such folder.
run ddpo --resume full  =>  --resume goes on with the run's own settings; leave out METHOD
run DDPO  =>  unknown method 'DDPO'
run ddpo ppo  =>  unrecognized arguments: ppo
run ""  =>  unknown method ''
run rlcm --world tokens  =>  rlcm (trains; consistency policies) does not run in world 'tok
run b2diffurl --world compass --set num_branches=0  =>  --set num_branches=0: '0' is not a whole number of at least
run b2diffurl --world compass --set num_branches=1 --set objective=pairwise  =>  advantage='global' with objective='
run b2diffurl --world compass --set history_stages=-1  =>  --set history_stages=-1: '-1' is not a whole number of at
run b2diffurl --world compass --set objective=pair  =>  --set objective=pair: 'pair' is not one of 'clip', 'pairwise
run ppo --world tokens --set temperature=0  =>  --set temperature=0: '0' is not a finite number above 0.
run ppo --world tokens --set temperature=-1  =>  --set temperature=-1: '-1' is not a finite number above 0.
run ppo --world tokens --set num_tokens=0  =>  --set num_tokens=0: '0' is not a whole number of at least 1.
run ppo --world tokens --set num_tokens=9999 --steps 1  =>  the longest prompt has 1 tokens and num_tokens is 9999,
run ppo --world tokens --set beta=-1  =>  --set beta=-1: '-1' is not a finite number of at least 0.
run ppo --world tokens --set gamma=2  =>  --set gamma=2: '2' is not a finite number of at least 0 and at
run ppo --world tokens --set kl_loss=k9  =>  --set kl_loss=k9: 'k9' is not one of None, 'k2', 'k3'.
run constrained --set thresholds=1 --steps 1  =>  there are 2 rewards and 1 thresholds: give one threshold for e
run constrained --set thresholds=a,b  =>  --set thresholds=a,b: 'a,b' is not a tuple, each a finite numb
run constrained --set multiplier_lr=-1  =>  --set multiplier_lr=-1: '-1' is not a finite number of at leas
run constrained --reward fives --steps 1  =>  there are 1 rewards and 2 thresholds: give one threshold for e
run par --set k=0  =>  --set k=0: '0' is not a finite number above 0.
run par --set method=best  =>  --set method=best: 'best' is not one of 'vanilla', 'centred',
run par --world compass  =>  par (shapes rewards; language policies) does not run in world
run teleport --set budgets=0  =>  --set budgets=0: '0' is not a tuple, each a whole number of at
run teleport --set budgets=  =>  budgets is empty; give at least one number of network evaluati
run teleport --set budgets=a  =>  --set budgets=a: 'a' is not a tuple, each a whole number of at
run teleport --set num_data=1 --world compass  =>  a covariance needs at least 2 samples; there is 1.
run reward_model --steps 0  =>  argument --steps: '0' is not a whole number of at least 1.
run reward_model --set num_pairs=0  =>  unknown field 'num_pairs'; did you mean 'num_epochs'? There ar
run consistency_distillation --set batch_size=0  =>  --set batch_size=0: '0' is not a whole number of at least 1.
run rwr --world compass --set keep=0  =>  --set keep=0: '0' is not a finite number above 0 and at most 1
run rwr --world compass --set keep=2  =>  --set keep=2: '2' is not a finite number above 0 and at most 1
methods nothing  =>  unknown method 'nothing'
methods ddpo extra  =>  unrecognized arguments: extra
methods ""  =>  unknown method ''
bench --device tpu --methods ddpo --worlds compass  =>  no device 'tpu' here (Expected one of cpu, cuda, ipu, xpu, m
bench --device cuda --methods ddpo --worlds compass  =>  no device 'cuda' here (Torch not compiled with CUDA enabled
bench --device "" --methods ddpo --worlds compass  =>  no device '' here (Device string must not be empty). There ar
bench --device cpu:99 --methods ddpo --worlds compass  =>  no device 'cpu:99' here (it is called cpu). There are: cp
bench --device cuda:0 --methods teleport  =>  no device 'cuda:0' here (Torch not compiled with CUDA enabled)
bench --device meta --methods ddpo --worlds compass  =>  no device 'meta' here
bench --rounds 0 --methods ddpo --worlds compass  =>  argument --rounds: '0' is not a whole number of at least 1.
bench --rounds -1 --methods ddpo --worlds compass  =>  argument --rounds: '-1' is not a whole number of at least 1.
bench --rounds x  =>  argument --rounds: 'x' is not a whole number of at least 1.
bench --methods  =>  argument --methods: expected at least one argument
bench --methods nothing  =>  unknown method 'nothing'
bench --methods ddpo --worlds nowhere  =>  unknown world 'nowhere'
bench --methods ddpo --worlds tokens  =>  ddpo (trains; diffusion or flow policies) does not run in world 'token
bench --methods ddpo --worlds compass --rounds 1 --out nowhere/x.json  =>  --out nowhere/x.json: there is no folder
bench --methods ddpo --worlds compass --rounds 1 --out full  =>  --out full is a folder; expected a file.
pretrain  =>  the following arguments are required: name
pretrain nothing  =>  unknown set of weights 'nothing'
pretrain digits --out afile  =>  --out afile: afile is a file; expected a folder.
pretrain digits --out afile/x  =>  --out afile/x:
pretrain digits --seed x  =>  argument --seed: 'x' is not a whole number of at least 0 and a
pretrain digits --seed -1 --out afile  =>  argument --seed: '-1' is not a whole number of at least 0 and
replicate  =>  which replication? One of
replicate nothing  =>  unknown replication 'nothing'
replicate ddpo --out nowhere/x.json  =>  --out nowhere/x.json: there is no folder
replicate ddpo --out full  =>  --out full is a folder; expected a file.
course  =>  the following arguments are required: action
course nothing  =>  argument action: invalid choice: 'nothing' (choose from 'build
course build --only 99  =>  no chapter's name starts with '99'. There are: 00_tour, 01_dif
course build --only nothing  =>  no chapter's name starts with 'nothing'. There are: 00_tour, 0
course copy  =>  the following arguments are required: folder
course copy afile  =>  DIR afile: afile is a file; expected a folder.
course copy afile/x  =>  DIR afile/x:
course copy ""  =>  argument folder: '' is no path.
course grade  =>  the following arguments are required: submissions
course grade nowhere  =>  no such file or folder: nowhere
course grade nb.ipynb --out full  =>  --out full needs a suffix, as in grades.csv; the folder beside
course grade nb.ipynb --seconds 0  =>  argument --seconds: '0' is not a whole number of at least 1.
course grade nb.ipynb --seconds -1  =>  argument --seconds: '-1' is not a whole number of at least 1.
course grade nb.ipynb --jobs 0  =>  argument --jobs: '0' is not a whole number of at least 1.
course grade nb.ipynb --jobs -2  =>  argument --jobs: '-2' is not a whole number of at least 1.
course grade nb.ipynb --chapter 99  =>  no chapter '99' in
course grade nb.ipynb --source nowhere  =>  nowhere holds no student's edition (NN_name.ipynb with checks)
course grade nb.ipynb --source afile  =>  afile holds no student's edition (NN_name.ipynb with checks).
course grade nb.ipynb --isolation none  =>  argument --isolation: invalid choice: 'none' (choose from 'aut
course grade empty  =>  empty holds no notebooks (*.ipynb).
nothing  =>  argument command: invalid choice: 'nothing' (choose from 'meth
"""
COMMANDS = [line.split("  =>  ") for line in TABLE.strip().splitlines()]


# And calls, which raise ValueError.
CALLS = r"""
measure.paired_difference(zeros(3), zeros(4))  =>  pairs have shapes (3,) and (4,); expected (n,) twice.
measure.paired_difference(zeros(3), zeros(3, 1))  =>  pairs have shapes (3,) and (3, 1); expected (n,) twice. Take
measure.paired_difference(zeros(1), zeros(1))  =>  a standard error needs at least 2 pairs; there is 1.
measure.frechet_distance(zeros(1, 2), zeros(5, 2))  =>  a covariance needs at least 2 samples; features_a has 1.
measure.frechet_distance(zeros(5, 3), zeros(5, 2))  =>  the two samples have shapes (5, 3) and (5, 2); expected (n,
measure.mmd(zeros(1, 2), zeros(5, 2), 1.)  =>  the unbiased estimate needs at least 2 samples on each side;
measure.mmd(zeros(5, 2), zeros(5, 2), 0.)  =>  the bandwidth is 0: more than half of the pooled points coin
measure.vendi_score(zeros(0, 2))  =>  features have shape (0, 2); expected (n, d), n of at least 1
measure.diversity(zeros(4, 2), 3 * ["a"], reduction="mean")  =>  there are 4 samples and 3 prompts; expected one pro
measure.distinct(["a b"], 0)  =>  n is 0 and texts list; expected n of at least 1 and a list o
rewards.checked(lambda s, p: s, zeros(3, 2), 3 * ["a"])  =>  reward '<lambda>' returned shape (3, 2) for 3 samples;
rewards.checked(lambda s, p: None, zeros(3, 2), 3 * ["a"])  =>  reward '<lambda>' returned None for 3 samples; expec
rewards.checked(first, zeros(3, 2), 2 * ["a"])  =>  was given 3 samples but 2 prompts.
rewards.checked("gold", zeros(3, 2), 3 * ["a"])  =>  reward 'str' raised TypeError: 'str' object is not callable.
rewards.checked(lambda s, p: s[:, 0] * 1j, zeros(3, 2), 3 * ["a"])  =>  reward '<lambda>' returned complex numbers;
rewards.checked(lambda s, p: torch.tensor([1., float("inf"), 2.]), zeros(3, 2), 3 * ["a"])  =>  reward '<lambda>' re
rewards.weighted_sum({}, {})  =>  weighted_sum needs at least one weight.
rewards.weighted_sum({"a": len}, {"b": 1.0})  =>  unknown reward 'b'
rewards.jpeg_size(zeros(2, 4, 8, 8), 2 * ["a"])  =>  jpeg_size reads images of shape (batch, 1 or 3, h, w); it wa
rewards.jpeg_size(zeros(2, 8, 8), 2 * ["a"])  =>  jpeg_size reads images of shape (batch, 1 or 3, h, w); it wa
load("nowhere")  =>  unknown world 'nowhere
load("compass", num_steps=0)  =>  num_steps is 0; expected a whole number of at least 1.
load("compass", num_steps=-1)  =>  num_steps is -1; expected a whole number of at least 1.
load("compass", num_steps=1.5)  =>  num_steps is 1.5; expected a whole number of at least 1.
load("compass", num_steps="ten")  =>  num_steps is 'ten'; expected a whole number of at least 1.
load("compass", eta=-1.)  =>  eta is -1.0; expected a finite number of at least 0 and at m
load("compass", eta=nan)  =>  eta is nan; expected a finite number of at least 0 and at mo
load("compass", eta=2.)  =>  eta is 2.0; expected a finite number of at least 0 and at mo
load("compass", colour="red")  =>  world 'compass' has no setting 'colour'
load("shapes", guidance_scale=nan)  =>  guidance_scale is nan; expected a finite number of at least
load("shapes", model="gan")  =>  unknown model 'gan' of world 'shapes'
load("digits", num_steps=2000)  =>  `num_inference_steps`: 2000 cannot be larger than `self.conf
next(ddpo.train(compass(), None, ["inner"]))  =>  reward 'NoneType' raised TypeError: 'NoneType' object is not
next(ddpo.train(compass(), first, "inner"))  =>  prompts is the string 'inner'; expected a list of strings: [
next(ddpo.train(compass(), first, []))  =>  prompts is empty; give at least one.
next(ddpo.train(compass(), first, ["nowhere"]))  =>  unknown prompt 'nowhere'; This policy knows: inner, outer.
next(ddpo.train(compass(), first, ["inner"], ddpo.Config(), 0))  =>  generator is 0; expected a torch.Generator.
next(ddpo.train(compass(), first, ["inner"], resume="r"))  =>  resume is 'r'; expected tensors by name, of load_chec
next(ddpo.train(tokens(), first, ["inner"]))  =>  the policy is a LanguagePolicy; this method needs one that d
next(ppo.train(compass(), first, ["inner"]))  =>  the policy is a DiffusionPolicy; this method needs one that
next(ppo.train(tokens(), first, []))  =>  prompts is empty; give at least one.
next(ppo.train(tokens(), first, "abc"))  =>  prompts is the string 'abc'; expected a list of strings: ['a
next(rlcm.train(compass(), first, ["inner"]))  =>  the policy is a DiffusionPolicy; this method needs one that
next(b2diffurl.train(compass(), first, "inner"))  =>  prompts is the string 'inner'; expected a list of strings: [
next(prdp.train(compass(), first, ["inner"], prdp.Config(group_size=1)))  =>  group_size is 1; PRDP compares the
next(prdp.train(tokens(), first, ["inner"]))  =>  the policy is a LanguagePolicy; this method needs one that d
next(d3po.train(compass(), first, ["inner"], d3po.Config(clip_range=1.0)))  =>  clip_range is 1.0; expected a number b
next(d3po.train(compass(), None, ["inner"]))  =>  who compares? Give a reward
d3po.pareto(zeros(1, 3), zeros(1, 1))  =>  expected one shape
prdp.prdp_loss(zeros(2, 3, 4), zeros(2, 3, 4), zeros(2, 3, 4), zeros(2, 1), 1., .1)  =>  got rewards (2, 1)
prdp.prdp_loss(zeros(2, 3, 4), zeros(2, 3, 1), zeros(2, 3, 4), zeros(2, 3), 1., .1)  =>  expected one shape
load("crowd", num_prompts=0)  =>  num_prompts is 0; expected a whole number of at least 1.
next(rwr.train(compass(), first, "inner"))  =>  prompts is the string 'inner'; expected a list of prompts: [
next(constrained.train(tokens(), [], [0]))  =>  there are 0 rewards and 0 thresholds: give one threshold for
par.Shaped(lambda s, p: s, None, par.Config("best"))  =>  method is 'best'; expected one of 'vanilla', 'centred', 'c
statistics.Statistics(last=0)  =>  last is 0; expected at least 1, or None for all.
statistics.Statistics(last=-1)  =>  last is -1; expected at least 1, or None for all.
statistics.Statistics(rounds=0)  =>  rounds is 0; expected at least 1, or None for all.
loop.fit([], total=-1)  =>  total is -1; expected at least 1 iteration, or None for all
compass().sample("inner")  =>  prompts is the string 'inner'; expected a list of strings: [
compass().sample([])  =>  prompts is empty; give at least one.
compass().sample(["nowhere"])  =>  unknown prompt 'nowhere'; This policy knows: inner, outer.
compass().sample(["inner"], zeros(2, 3))  =>  noise has shape (2, 3); expected (1, 21, 2), as draw_noise(1
compass().rollout(["inner"], zeros(1, 2))  =>  noise has shape (1, 2); expected (1, 21, 2), as draw_noise(1
compass().rollout(["inner"], first=5, last=3)  =>  first is 5 and last 3; expected 0 <= first <= last <= 20, th
compass().rollout(["inner"], last=99)  =>  first is 0 and last 99; expected 0 <= first <= last <= 20, t
compass().rollout(["inner"], grad_steps=-1)  =>  grad_steps is -1; this run has 0 to 20 last network calls to
compass().rollout(["inner"], grad_steps=[99])  =>  grad_steps names step 99; this run calls the network at [0,
compass().set_num_steps(0)  =>  num_steps is 0; expected a whole number of at least 1.
compass().draw_noise(-1)  =>  -1 samples; expected at least 1.
compass().draw_noise(0)  =>  0 samples; expected at least 1.
assistant().add_lora(rank=0)  =>  `r` should be a positive integer value but the value passed
assistant().add_lora(rank=-1)  =>  `r` should be a positive integer value but the value passed
assistant().add_lora(target_modules=["nowhere"])  =>  Target modules {'nowhere'} not found in the base model. Plea
assistant().add_lora(target_modules=[])  =>  No `target_modules` passed but also no `target_parameters` f
load("shapes").policy.add_lora(rank=0)  =>  `r` should be a positive integer value but the value passed
load("shapes").policy.add_lora(target_modules=["nowhere"])  =>  Target modules {'nowhere'} not found in the base mod
assistant().generate(["a"], 0)  =>  num_tokens is 0, temperature 1.0; expected at least 1, and a
assistant().generate(["a"], -1)  =>  num_tokens is -1, temperature 1.0; expected at least 1, and
assistant().generate(["a"], 10000)  =>  the longest prompt has 1 tokens and num_tokens is 10000, tog
assistant().generate("hello", 3)  =>  prompts is the string 'hello'; expected a list of strings: [
assistant().generate([""], 3)  =>  prompt '' has no tokens: the first action needs at least one
assistant().generate([3], 3)  =>  text input must be of type `str` (single example), `list[str
assistant().generate(["a"], 3, temperature=0.)  =>  num_tokens is 3, temperature 0.0; expected at least 1, and a
assistant().generate(["a"], 3, temperature=nan)  =>  num_tokens is 3, temperature nan; expected at least 1, and a
assistant().parameters()  =>  nothing to train: call policy.add_lora() or policy.train_all
assistant().add_value_heads(0)  =>  num_heads is 0; expected a whole number of at least 1
kernels.clipped_surrogate(zeros(3), zeros(3, 1), zeros(3), 0.2)  =>  expected one shape
kernels.clipped_surrogate(zeros(3), zeros(3), zeros(4), 0.2)  =>  expected one shape
"""
CALLS = [line.split("  =>  ") for line in CALLS.strip().splitlines()]


class Spent(BaseException):
    """It ran for so long that something must be training."""


def impatient(*_):
    raise Spent


@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "empty").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("line", "message"), COMMANDS)
def test_a_bad_command_is_refused_by_name(line, message, bad_files):
    said = io.StringIO()
    signal.signal(signal.SIGALRM, impatient)
    signal.alarm(60)
    try:
        with contextlib.redirect_stderr(said):
            code = cli.main(shlex.split(line.replace("LONG", 300 * "a").replace("NUL", "\0")))
    except SystemExit as error:  # argparse's
        code = error.code
    finally:
        signal.alarm(0)
    assert code == 2
    assert "Traceback" not in said.getvalue()
    assert message in " ".join(said.getvalue().split("\n"))
    left = {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert left == bad_files


def in_world(name: str):
    return lambda: worlds.load(name).policy


NAMES = dict(
    kernels=kernels, loop=loop, measure=measure, rewards=rewards, statistics=statistics, load=worlds.load, torch=torch,
    b2diffurl=b2diffurl, constrained=constrained, d3po=d3po, ddpo=ddpo, par=par, ppo=ppo, prdp=prdp, rlcm=rlcm, rwr=rwr,
    zeros=torch.zeros, nan=float("nan"), first=lambda samples, prompts: samples[:, 0],
    compass=in_world("compass"), tokens=in_world("tokens"), assistant=in_world("assistant"),
)  # fmt: skip


@pytest.mark.parametrize(("call", "message"), CALLS)
def test_a_bad_call_is_refused_by_name(call, message):
    jaxtyping.config.update("jaxtyping_disable", True)  # a user has no annotations checked
    try:
        with pytest.raises(ValueError, match=re.escape(message)):
            eval(call, NAMES)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


NONSENSE = [float("nan"), float("inf"), -1, 0, 0.5, True, "many", None, (), 1e300]


@pytest.mark.parametrize("method", CATALOGUE)
def test_every_setting_refuses_nonsense(method):
    """Whatever a field's annotation does not admit; each admits less than half of it."""
    config = CATALOGUE[method].module.Config
    for name, annotation in annotations(config).items():
        refused = [value for value in NONSENSE if not fits(value, annotation)]
        assert len(refused) > 4
        for value in refused:
            with pytest.raises(ValueError, match=f"{name} is {re.escape(repr(value))}"):
                config(**{name: value})
