"""TRL's GRPOTrainer and our run as two sides of a comparison: clocks read at every step, work counted and compared.

What TRL spares itself here already: one update a batch, so no second scoring for the old log-probs; no reference model
(``beta=0``); no gradient checkpointing; no logs, no checkpoints, no progress bar; torch's fused AdamW.

What else a user could switch on, and why it is not among what :func:`best_setting` tries:

- transformers' continuous batching on a CPU: a step took 6 times as long (34.1 s against 5.4 s, 32 x 8 x 64).
- ``torch_compile``: generation stays as it is (the trainer sets ``disable_compile``), and a first step of 32 x 8 x 64
  had not ended after 9 minutes of a busy core.
- ``cache_implementation`` other than ``static``: ``offloaded`` and ``quantized`` are there to save a GPU's memory.
- ``dtype="bfloat16"`` weights: those are no float32 master weights, and the updates of a small rate round to nothing.
- ``use_vllm`` wants a GPU and ``use_liger_kernel`` Triton; the data loader has nothing to load, the models no dropout.
- More ``steps_per_generation`` than are accumulated: several updates a batch, and old log-probs that have to be scored.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mulligan.log import RunLog, read_metrics
from mulligan.session import Session
from mulligan.stopping import Stopper
from mulligan.train import one_step

# Called behind every step with its seconds and the model; whether to stop there. Its own time is not TRL's.
After = Callable[[float, torch.nn.Module], bool]
BETAS, EPS, DECAY, CLIP = (0.9, 0.999), 1e-8, 0.0, 1.0  # of AdamW and of the gradient's norm, for both sides
SLOWER = 1.15  # a setting whose first step takes so much longer than the best one's faster step is given up


def need_trl() -> None:
    """Ends with one line where TRL is absent."""
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("this comparison needs another package: pip install 'mulligan[trl]'")


@dataclass(frozen=True)
class Setting:
    """How TRL is run."""

    batch: int  # completions a forward pass; the rest is accumulated
    cache: str | None = None
    attention: str = "sdpa"
    engine: str = "generate"  # or "continuous", transformers' continuous batching
    precision: str = "float32"  # "bfloat16" is autocast over float32 weights

    def __str__(self) -> str:
        words = [f"batch {self.batch}", f"{self.cache or 'dynamic'} cache", self.attention, self.precision]
        if self.engine == "continuous":
            words[1] = "continuous batching"
        return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is asked of TRL.

    Attributes:
        prompts: in the order in which they are read, special tokens spelled out; ``width`` a step.
        columns: of the data set beside the prompts; the reward function gets them.
        reward: as TRL wants it.
    """

    model: Path
    prompts: Sequence[str]
    reward: Callable[..., list[float]]
    width: int  # prompts a step
    samples: int  # of each prompt
    new: int  # tokens of a response at most
    rate: float
    columns: dict[str, list[Any]] = field(default_factory=dict)
    seed: int = 0


@dataclass
class Done:
    """What TRL did."""

    lengths: list[int] = field(default_factory=list)  # of every sampled response
    rows: int = 0  # that went through the loss
    tokens: int = 0  # of those, that the loss counts
    updates: int = 0  # optimizer steps


def trl_trainer(order: Order, setting: Setting, steps: int, after: After, folder: Path) -> tuple[Any, Done]:
    """A trainer that has not begun, and the counts of what it will have done."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    done = Done()

    class Counted(GRPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            done.rows += len(inputs["completion_mask"])
            done.tokens += int(inputs["completion_mask"].sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):
        begun = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronise()
            self.begun = time.perf_counter()

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            done.updates += 1

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **__: Any) -> Any:
            synchronise()
            control.should_training_stop |= after(time.perf_counter() - self.begun, model)
            return control

    def reward(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        done.lengths.extend(map(len, completion_ids))
        return order.reward(completions=completions, completion_ids=completion_ids, **columns)

    rows = order.width * order.samples
    trainer = Counted(
        model=str(order.model),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(folder),
            use_cpu=not torch.cuda.is_available(),
            per_device_train_batch_size=setting.batch,
            gradient_accumulation_steps=rows // setting.batch,
            num_generations=order.samples,
            max_completion_length=order.new,
            cache_implementation=setting.cache,
            use_transformers_continuous_batching=setting.engine == "continuous",
            bf16=setting.precision == "bfloat16",
            model_init_kwargs={"dtype": "float32", "attn_implementation": setting.attention},
            temperature=1.0,
            beta=0.0,
            num_iterations=1,
            loss_type="dapo",  # one denominator for all tokens of a step, as ours
            scale_rewards="group",
            epsilon=0.2,
            optim="adamw_torch_fused",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            weight_decay=DECAY,
            learning_rate=order.rate,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP,
            max_steps=steps,
            shuffle_dataset=False,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=order.seed,
        ),
        train_dataset=Dataset.from_dict({"prompt": list(order.prompts), **order.columns}),
        callbacks=[Clock()],
    )
    return trainer, done


def train_trl(order: Order, setting: Setting, steps: int, after: After, folder: Path) -> Done:
    """Runs TRL for some steps; what it did."""
    with quiet():
        trainer, done = trl_trainer(order, setting, steps, after, folder)
        trainer.train()
        check_optimizer(trainer.optimizer, order.rate, "TRL")
    return done


def hush() -> None:
    """No progress bars and no warnings of transformers and TRL for the whole process."""
    from transformers.utils import logging as transformers_logging

    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without TRL's tables and warnings."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Quiet:
    """Our reporter, which says nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class Ours:
    """Our side: a run that is asked for one step after another."""

    def __init__(self, session: Session, out: Path) -> None:
        check_optimizer(session.learner.optimizer, session.run.optimizer.learning_rate, "our run")
        self.session, self.log, self.out, self.stopper = session, RunLog(out), out, Stopper()

    def step(self) -> float:
        """One step's seconds."""
        synchronise()
        begun = time.perf_counter()
        one_step(self.session, self.log, Quiet(), self.stopper)
        synchronise()
        return time.perf_counter() - begun

    def close(self, rows: int) -> dict[str, Any]:
        """The last step's metrics.

        Args:
            rows: that every step has to have sampled and trained.
        """
        self.log.close()
        records = list(read_metrics(self.out / "metrics.jsonl"))
        for record in records:
            if record["rollout/samples"] != rows or record["update/rows"] != rows:
                raise SystemExit(
                    f"step {record['step']} of ours has {record['rollout/samples']:g} samples and "
                    f"{record['update/rows']:g} rows, not {rows}"
                )
        return records[-1]


def check_optimizer(optimizer: Any, rate: float, whose: str) -> None:
    """Both sides are to have the same one."""
    for group in optimizer.param_groups:
        found = (tuple(group["betas"]), group["eps"], group["weight_decay"], group["lr"], bool(group["fused"]))
        if found != (BETAS, EPS, DECAY, rate, True):
            raise SystemExit(f"{whose} has another optimizer: betas, eps, decay, rate, fused are {found}")


def our_optimizer(rate: float) -> dict[str, Any]:
    """The same for our run's ``[optimizer]``."""
    return {
        "learning_rate": rate,
        "betas": list(BETAS),
        "eps": EPS,
        "weight_decay": DECAY,
        "clip_norm": CLIP,
        "options": {"fused": True},
    }


def check_work(done: Done, order: Order, steps: int) -> None:
    """TRL sampled and trained every completion once, in one update a step."""
    rows = steps * order.width * order.samples
    found = (len(done.lengths), done.rows, done.tokens, done.updates)
    if found != (rows, rows, sum(done.lengths), steps):
        raise SystemExit(
            f"TRL did other work than was ordered: {found[0]} samples, {found[1]} rows, {found[2]} tokens in the loss "
            f"and {found[3]} updates, not {rows}, {rows}, {sum(done.lengths)} and {steps}"
        )


def best_setting(order: Order, folder: Path, say: Callable[[str], None]) -> Setting:
    """The fastest of TRL's settings, found one choice after another: each is tried with the best of those before it.

    A setting's time is that of the faster of two steps. It is given up after its first where that took ``SLOWER`` times
    the best one's, and where this release or machine cannot run it.
    """
    rows = order.width * order.samples
    choices: list[dict[str, Any]] = [{}, {"batch": rows // 4}, {"precision": "bfloat16"}, {"attention": "eager"}]
    # The static cache takes no autocast in some releases, so it is tried without as well.
    choices += [{"cache": "static"}, {"cache": "static", "precision": "float32", "attention": "sdpa"}]
    if torch.cuda.is_available():
        choices.append({"engine": "continuous"})
    best, least = Setting(rows), float("inf")
    tried: set[Setting] = set()
    for choice in choices:
        setting = replace(best, **choice)
        if setting in tried:
            continue
        tried.add(setting)
        times: list[float] = []

        def slow(seconds: float, _: Any, times: list[float] = times, limit: float = SLOWER * least) -> bool:
            times.append(seconds)
            return seconds > limit

        try:
            train_trl(order, setting, 2, slow, folder)
        except Exception as error:  # a setting that this release or machine cannot do is not its best one
            text = str(error).strip() or type(error).__name__
            say(f"TRL, {setting}: cannot run ({text.splitlines()[0][:100]})")
            continue
        say(f"TRL, {setting}: {min(times):.2f} s{'' if len(times) > 1 else ', its first step'}")
        if min(times) <= least:
            best, least = setting, min(times)
    if least == float("inf"):
        raise SystemExit("TRL runs with none of the settings that were tried")
    return best


def synchronise() -> None:
    """Waits for the device, so that a clock reads what was done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
