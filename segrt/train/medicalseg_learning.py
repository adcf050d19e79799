"""MedicalSeg's optimizer and schedule as fields of a `TrainConfig`; part of the import."""

from __future__ import annotations

from .medicalseg_section import Section

# type in the file -> (segrt's optimizer, momentum when the file says none)
_OPTIMIZERS = {
    "sgd": ("sgd", 0.9),
    "Momentum": ("sgd", 0.9),
    "SGD": ("sgd", 0.0),
    "adam": ("adam", 0.0),
    "Adam": ("adam", 0.0),
    "AdamW": ("adamw", 0.0),
}
_FOREIGN = {"adamw": "adamw", "AdamDecay": "adamw"}  # the article's words, which public MedicalSeg does not take
_DECAY = {"sgd": 0.0, "adam": 0.0, "adamw": 0.01}  # Paddle's own where the file says none
_EPSILON = 1e-8


def read_optimizer(section: Section) -> None:
    """Take `optimizer`; what the file leaves out is Paddle's default, not segrt's."""
    notes, kind = section.notes, section.text("type")
    if kind in _FOREIGN:
        name, momentum = _FOREIGN[kind], 0.0
        notes.warn(
            section.name("type"),
            kind,
            "public MedicalSeg takes sgd, adam or the exact name of a paddle.optimizer class such as AdamW, not this word of the article; "
            "AdamW is trained",
        )
        notes.changes["optimizer"] = name
    elif kind in _OPTIMIZERS:
        name, momentum = _OPTIMIZERS[kind]
        notes.use(section.name("type"), kind, name, optimizer=name)
    else:
        notes.refuse(section.name("type"), kind, f"one of {', '.join([*_OPTIMIZERS, *_FOREIGN])}", "optimizer", flag="--optimizer")
        section.drop(dict.fromkeys(["momentum", "use_nesterov", "weight_decay", "beta1", "beta2", "epsilon"], "belongs to that optimizer"))
        section.close()
        return
    if name == "sgd":
        _read_momentum(section, momentum)
    else:
        _read_betas(section)
    decay = section.number("weight_decay", _DECAY[name]) if section.take("weight_decay") is not None else _DECAY[name]
    how = "decoupled, as Paddle's" if name == "adamw" else "L2"
    left_out = "" if "weight_decay" in section else ", Paddle's default"
    notes.use(section.name("weight_decay"), decay, f"{how}{left_out}", weight_decay=decay)
    section.close(("use_nesterov", "beta1", "beta2"))


def _read_momentum(section: Section, default: float) -> None:
    momentum, nesterov = section.number("momentum", default), section.yes("use_nesterov", False)
    section.notes.use(section.name("momentum"), momentum, f"SGD's{'' if 'momentum' in section else ', as by default'}", momentum=momentum)
    section.notes.use(section.name("use_nesterov"), nesterov, "the same", nesterov=nesterov and momentum > 0)
    section.drop(dict.fromkeys(["beta1", "beta2", "epsilon"], "only Adam and AdamW have it"))


def _read_betas(section: Section) -> None:
    betas = section.number("beta1", 0.9), section.number("beta2", 0.999)
    for key, beta in zip(("beta1", "beta2"), betas, strict=True):
        section.notes.use(section.name(key), beta, "the same", betas=betas)
    if section.number("epsilon", _EPSILON) != _EPSILON:
        section.notes.warn(section.name("epsilon"), section.take("epsilon"), f"segrt's is always {_EPSILON:g}")
    section.drop(dict.fromkeys(["momentum", "use_nesterov"], "only SGD has it, public MedicalSeg refuses it here; it is left out"))


def read_schedule(top: Section, iterations: int) -> None:
    """Take `lr_scheduler`, or the older `learning_rate`; the rate changes with every iteration, as MedicalSeg's does."""
    notes = top.notes
    notes.changes["schedule_by_epoch"] = False
    if "lr_scheduler" in top:
        section = top.section("lr_scheduler")
        top.drop({"learning_rate": "lr_scheduler counts"})
        _read_kind(section, section.text("type"), section.number("learning_rate"), iterations)
        section.drop({"last_epoch": "a training begins with its first iteration, or where its checkpoint ended", "verbose": "not needed"})
        section.close(("decay_steps", "end_lr", "power"))
        return
    if not isinstance(top.take("learning_rate"), dict):
        lr = top.number("learning_rate")
        notes.use("learning_rate", lr, "constant", lr=lr, schedule="constant")
        return
    older = top.section("learning_rate")
    decay = older.section("decay") if "decay" in older else Section({"type": "poly"}, notes, older.name("decay"))
    _read_kind(decay, decay.text("type"), older.number("value"), iterations)
    decay.close()
    older.close()


def _read_kind(section: Section, kind: str, lr: float, iterations: int) -> None:
    notes = section.notes
    notes.use(section.name("learning_rate"), lr, "the first iteration's", lr=lr)
    key = section.name("type")
    match kind:
        case "PolynomialDecay" | "poly":
            notes.use(key, kind, "poly, per iteration", schedule="poly")
            _read_poly(section, iterations)
        case "StepDecay" | "stepdecay":
            every, gamma = section.whole("step_size"), section.number("gamma", 0.1)
            notes.use(key, kind, f"step: times {gamma:g} every {every} iterations", schedule="step", step_iterations=every, gamma=gamma)
        case "CosineAnnealingDecay":
            period, end = section.whole("T_max"), section.number("eta_min", 0.0)
            notes.use(
                key, kind, f"cosine: down to {end:g} over {period} iterations", schedule="cosine", end_lr=end, decay_iterations=period
            )
            if period < iterations:
                notes.warn(section.name("T_max"), period, f"Paddle's rate rises again after it, segrt's stays {end:g} up to {iterations}")
        case _:
            notes.refuse(key, kind, "PolynomialDecay, StepDecay or CosineAnnealingDecay", "schedule", flag="--schedule")
            section.drop(dict.fromkeys(list(section.left()), "belongs to that schedule"))


def _read_poly(section: Section, iterations: int) -> None:
    notes, key = section.notes, section.name("decay_steps")
    steps, end, power = section.whole("decay_steps", iterations), section.number("end_lr", 0.0), section.number("power", 0.9)
    notes.use(section.name("end_lr"), end, "the same", end_lr=end)
    notes.use(section.name("power"), power, "the same", power=power)
    if steps < iterations and end == 0 and not notes.beaten("decay_iterations"):
        notes.warn(
            key,
            steps,
            f"the rate would be 0 from iteration {steps} on and the rest of the {iterations} learn nothing; it falls over all of them "
            "(--decay-iters for another length)",
        )
    elif steps != iterations:
        notes.use(key, steps, f"the rate falls over {steps} of {iterations} iterations", decay_iterations=steps)
    else:
        notes.use(key, steps, "the rate falls over the whole training")
    if section.yes("cycle", False):
        notes.warn(section.name("cycle"), True, "segrt's rate does not rise again")
