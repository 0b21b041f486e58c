"""The Keras callback that synchronises a swarm."""

import os
import time
import weakref
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tf_psops import _checks, heartbeat, rules, tensorflow_internals
from tf_psops.backups import resume
from tf_psops.keras_hooks import (
    file_writers,
    fit_checks,
    progress,
    stop_vote,
    swapped_weights,
    swarm_summaries,
)
from tf_psops.sync import alarms, divergence, synchronizer
from tf_psops.transport import equality

# What a worker votes for the whole swarm, the strongest last.
_GO_ON, _STOP_ON_NAN, _STOP, _GO_AWAY = range(4)


class PSOSync(keras.callbacks.Callback):
    """Moves the particles of a `SwarmStrategy` every `sync_every` local steps.

    At a synchronisation every particle brings its position (its trainable weights)
    and its fitness (its own mean training loss since the last synchronisation), and
    a rule moves it. A last synchronisation closes training: `fit` leaves one agreed
    model on every replica of every worker. With an optimizer that has `use_ema`, that
    is the mean of the particles' moving averages.

    From the first `fit` on, the model speaks for the whole swarm. Validation,
    `evaluate`, `predict`, `get_weights`, `save`, `save_weights` and `export` take the
    position that the last synchronisation agreed on, on every worker the same (the
    starting one before the first), with the non-trainable state that was averaged
    there; afterwards the particles go on from their own. `set_weights` and
    `load_weights` make all particles start from there, and must be called on all
    workers. Only the chief writes files, `predict` gives all rows on every worker, and
    `evaluate` must be called on all workers. What a callback sets a single variable to
    holds for all of that until the next synchronisation, which averages it.

    A model consists of the variables that were made in the strategy's scope and that
    it, its layers, optimizers, metrics or other attributes hold. What was made outside
    must not change in training. After an exception in `fit` the model still speaks for
    the swarm, and the next training goes on from there, with this PSOSync or another.

    All workers must use it with the same arguments, and must train for the same
    number of steps. What differs is an error on all of them. They stop together: over
    several workers, `model.stop_training`, set by a callback on any of them wherever it
    stands in the list, takes effect on all at the next synchronisation or end of an
    epoch. (Only a `History` of your own must be the last callback.) An exception that
    leaves `fit` on one worker ends training on all with an error that names it, and so
    does a wait longer than the strategy's `timeout`; the workers must then be started
    again.

    Keras' `CSVLogger` and `TensorBoard` beside it write on the chief alone, because the
    logs are the same everywhere. In the `log_dir` of a `TensorBoard` the chief also
    writes the numbers of `log`, as a run "swarm". The progress bar shows "syncs",
    "num_workers", "diversity" (spread / way, see `log`) and "sync_share", the share of
    the time in synchronisations since the first. `BackupAndRestore`, which keeps one
    particle and not the swarm, is refused.

    Args:
        sync_every: The synchronisation interval in local steps (mini-batches), at
            least 1; with `steps_per_execution` above 1 a multiple of that.
        rule: How the particles move, a `tf_psops.Rule`. Defaults to
            `tf_psops.CentroidSwarm()`.
        non_trainable: What happens to float state that the training step assigns, such
            as BatchNormalization's moving statistics, a teacher network, or weights
            that another optimizer than the model's trains, at a synchronisation:
            "average" averages it over the swarm, "local" leaves it to each particle
            until training closes, which averages it. What has no mean (whole numbers,
            bools) stays local until then, when all take the first particle's; random
            seeds and the states of stateful layers stay local. Defaults to
            "average".
        optimizer_slots: What happens to all optimizers' slots, such as momentum:
            "local" leaves them to each particle, "average" averages them ("Local
            Adam"), at the cost of as much traffic again for each slot. "rescale" is for
            Adam and its kin on unlike data: it rescales the second moments (Keras'
            "velocity") of each particle by the swarm's means of their rows and
            columns, at the cost of these means, a few hundredths of the weights.
            Defaults to "local".
        payload_dtype: The type in which the weights travel: "float32", or "float16"
            or "bfloat16" for half the traffic. What travels is the way from the last
            synchronisation, rounded; what stays on a particle is not, nor are slots
            and other state that is averaged: in float16 second moments would underflow.
            Defaults to `None`, the weights' own type.
        delay: How many local steps to take while the weights travel, from 0 to below
            `sync_every`, with `steps_per_execution` above 1 a multiple of that. What a
            synchronisation makes of the weights at its start is applied `delay` steps
            later, to particles that have gone on: they keep the way since then. Only
            there do they wait for slower ones. A synchronisation that training does not
            outlast is applied when it ends. See "Streaming DiLoCo" (arXiv 2501.18512).
            Defaults to 0: training waits.
        backup_dir: Folder for backups of the whole swarm, from which a training that
            was cut short goes on when it is started again: every particle's weights,
            state, optimizer and what the rule remembers, and the step in the epoch.
            The batches before are drawn again and skipped, so the dataset must give
            the same ones again; with `steps_per_epoch`, one that does not end
            (`repeat`) or lasts for all epochs. A training that has ended is not
            repeated: `fit` returns its result. Each `fit` of the callback has a
            folder of its own inside, in the order of the calls. SIGTERM to any worker
            makes all take a backup at the next synchronisation and then exit with
            code 143. The workers may share the folder, or each have one. What other
            callbacks remember starts anew. Defaults to `None`: no backups.
        backup_every: How many synchronisations to let pass from one backup to the
            next, at least 1. Files are written in the background. Defaults to 10.
        elastic: Whether to go on from a backup of another number of particles, in a
            folder that all workers share. Particles of the same index keep what they
            had; new ones start from what the swarm agreed on. Where an epoch then has
            another number of steps, the same share of it is over. Defaults to `False`.

    Attributes:
        num_syncs: Synchronisations since training began.
        bytes_moved: Bytes that each particle got in them: the vectors and scalars,
            whatever the collectives make of them on the wire.
        members: The workers that are there, a sorted tuple of their indices.
        sync_seconds: Wall seconds that this worker spent in them, waiting included.
        fitness: NumPy array [W], every particle's mean training loss before the
            last synchronisation; infinite for a particle out of order, NaN where it is
            unknown.
        log: A list with a dict for each synchronisation since `fit` began, for a table
            or `json.dumps`: plain numbers, and `None` where a number is not finite,
            unknown, or of a worker that is not there. It is `swarm` of the `History`
            that `fit` returns, too, whose `history` has epochs, and is as in plain
            Keras.

            - "sync", its number, from 0; "step", the local steps at its start;
              "epoch"; "seconds", wall seconds since training began.
            - "fitness" and "distances", of every particle, its mean training loss and
              how far it had come from where the swarm went on last; "diverged", the
              indices of the particles that were out of order.
            - "measures", a dict of what the rule says of itself (`Rule.measures`). Of
              the default rule: "inertia"; "way", of the centroid since the last one;
              "spread", the root mean square distance of the particles from the
              centroid; "cohesion", (way / spread)**2: the lower, the more diverse.
            - "members", the workers that took part; "bytes", as in `bytes_moved`.
            - "waiting_seconds", in which training stood still on this worker until the
              others had come (with a `delay`, until what travelled was there), and
              "working_seconds", the others that it took; "waited", the waiting seconds
              of every worker at the synchronisation before.
        num_diverged: How many times a particle was out of order at a synchronisation:
            its loss or a weight was not finite, or it had moved a hundred times as far
            as the others, to a larger loss. It is never a best, what it brings reaches
            no other particle, and it goes on from what travelled, with fresh optimizer
            slots. Each case is logged as a warning.

    Once in a training, on the chief, a warning says what to do where all particles
    train on the same rows; where the swarm flies apart; where one particle is always
    last, or out of order again and again; where the particles' shards of the data are
    unequal; where one worker is always waited for; and where synchronisations take more
    than a fifth of the time.

    Raises:
        ValueError: If an argument is out of its range; when training begins, if the
            model or its optimizer was not made in the scope of a `SwarmStrategy`, if
            another callback does not fit, if the workers have different models or
            arguments, or if a backup is damaged or of another swarm; and during
            training, if a synchronisation does not fall on the end of an execution of
            `steps_per_execution` steps, or the rule returns what it must not.
        FloatingPointError: During training, if no particle is in good health, or the
            rule gives one a position that is not finite.
        OSError: If a backup cannot be written.
        RuntimeError: During training, if the workers are not at the same step, if
            another worker has failed, or if another `fit` has taken the callback over.
        TimeoutError: During training, if a worker has not come in time.

    Example:

    ```python
    strategy = tf_psops.SwarmStrategy.in_process(4)
    with strategy.scope():
        model = make_model()
        model.compile(optimizer=keras.optimizers.SGD(0.05), loss="mse")
    model.fit(dataset, epochs=3, callbacks=[tf_psops.PSOSync(10)])
    ```
    """

    def __init__(
        self,
        sync_every: int,
        rule: rules.Rule | None = None,
        non_trainable: Literal["average", "local"] = "average",
        optimizer_slots: Literal["average", "local", "rescale"] = "local",
        payload_dtype: Literal["float32", "float16", "bfloat16"] | None = None,
        delay: int = 0,
        backup_dir: str | os.PathLike[str] | None = None,
        backup_every: int = 10,
        elastic: bool = False,
    ):
        super().__init__()
        rule = rules.CentroidSwarm() if rule is None else rule
        good = _checks.is_whole(sync_every) and sync_every >= 1
        _checks.check(
            good, "a whole number of local steps, at least 1", sync_every=sync_every
        )
        rules.check_rule(rule)
        _checks.check(
            isinstance(non_trainable, str) and non_trainable in ("average", "local"),
            "'average' or 'local'",
            non_trainable=non_trainable,
        )
        _checks.check(
            isinstance(optimizer_slots, str)
            and optimizer_slots in ("average", "local", "rescale"),
            "'average', 'local' or 'rescale'",
            optimizer_slots=optimizer_slots,
        )
        _checks.check(
            payload_dtype in (None, "float32", "float16", "bfloat16"),
            "'float32', 'float16', 'bfloat16' or None",
            payload_dtype=payload_dtype,
        )
        good = _checks.is_whole(delay) and 0 <= delay < sync_every
        _checks.check(
            good,
            f"a whole number of local steps from 0 to below sync_every={sync_every}",
            delay=delay,
        )
        _checks.check(
            backup_dir is None or isinstance(backup_dir, (str, os.PathLike)),
            "the path of a folder, or None",
            backup_dir=backup_dir,
        )
        _checks.check(isinstance(elastic, bool), "True or False", elastic=elastic)
        good = _checks.is_whole(backup_every) and backup_every >= 1
        _checks.check(
            good,
            "a whole number of synchronisations, at least 1",
            backup_every=backup_every,
        )
        self.sync_every = sync_every
        self.rule = rule
        self.payload_dtype = payload_dtype
        self.delay = delay
        self.non_trainable = non_trainable
        self.optimizer_slots = optimizer_slots
        self.sync_seconds = 0.0
        self.fitness: np.ndarray | None = None
        self.log: list[dict[str, Any]] = []
        self.members: tuple[int, ...] = (0,)
        self._may_admit = True
        self._synchronizer = None
        self._stop_vote = None
        self._stops_on_nan = False
        self._synchronized = None
        self._warmed_up = False
        self._history = None  # That of the `fit` that goes on.
        self._first_step = 0
        self._steps = 0
        self._epoch = 0
        self._steps_in_epoch = 0
        self._synced_steps = 0
        self._diverged = False
        self._resume_state = resume.Resume(backup_dir, backup_every, elastic)
        self._file_writers = None
        self._summaries = None
        self._progress = None
        self._alarms = None
        self._begun = 0.0
        self._start_seconds = 0.0
        self._start_epoch = 0

    @property
    def num_syncs(self) -> int:
        return self._synchronizer.num_syncs if self._synchronizer else 0

    @property
    def num_diverged(self) -> int:
        return self._synchronizer.num_diverged if self._synchronizer else 0

    @property
    def bytes_moved(self) -> int:
        return self._synchronizer.bytes_moved if self._synchronizer else 0

    def set_model(self, model):
        super().set_model(model)
        fit_checks.check_strategy(model)
        callback_list = tensorflow_internals.calling_list(self)
        if callback_list is None:
            return
        fit_checks.check_callbacks(callback_list.callbacks, PSOSync)
        self._stops_on_nan = any(
            isinstance(callback, keras.callbacks.TerminateOnNaN)
            for callback in callback_list.callbacks
        )
        self._file_writers = file_writers.FileWriters(callback_list)
        self._file_writers.leave_to(model.distribute_strategy.is_chief)

    def on_train_begin(self, logs=None):
        fit_checks.check_multiples(
            self.model.steps_per_execution, sync_every=self.sync_every, delay=self.delay
        )
        fit_checks.check_scope(self.model)
        # A later `fit` of the same compiled model goes on with what was traced.
        loss_tracker = tensorflow_internals.means(self.model)[0]
        compiled = (self.model, self.model.optimizer, loss_tracker)
        speaker = swapped_weights.speaker(self.model)
        is_new = self._synchronized != compiled or speaker is not self._synchronizer
        if speaker and is_new:
            speaker.come_to_rest()
        settings = {**self._settings(), "first fit of this PSOSync": is_new}
        with self._barrier("the start of training"):
            equality.check(
                self.model.distribute_strategy, "the start of training", settings
            )
        if is_new:
            self._synchronized = compiled
            self._synchronizer = synchronizer.Synchronizer(
                self.model.distribute_strategy,
                self.model,
                self.rule,
                average_non_trainable=self.non_trainable == "average",
                average_slots=self.optimizer_slots == "average",
                payload_dtype=self.payload_dtype,
                delayed=self.delay > 0,
                rescale_moments=self.optimizer_slots == "rescale",
            )
            self._warmed_up = False
            self.model.make_train_function(force=True)
            swapped_weights.speak_for_swarm(self.model, self._synchronizer, PSOSync)
        with self._barrier("the start of training"):
            self._synchronizer.begin(self._averages_callback())
            self._resume_state.begin(
                self.model, self._synchronizer, self._steps_per_epoch(), self._resume
            )
        group = self.model.distribute_strategy.peers
        self.members = group.members if group else (0,)
        self.model.distribute_strategy.end_in_backup = weakref.WeakMethod(
            self._end_in_backup
        )
        self._may_admit = True
        self._history = self.model.history
        self._stop_vote = stop_vote.StopVote(self.model, self._synchronizer.any_worker)
        self._begin_log()
        self.sync_seconds = 0.0
        self._first_step = self._steps = self._synced_steps = 0
        self._diverged = False

    def _begin_log(self):
        self.log = self.model.history.swarm = []
        self._alarms = alarms.Alarms(self.sync_every)
        if self._summaries:
            self._summaries.close()
        callback_list = tensorflow_internals.calling_list(self)
        self._progress = callback_list and progress.Progress(callback_list)
        self._summaries = callback_list and swarm_summaries.SwarmSummaries(
            callback_list,
            {
                "particles": self._synchronizer.num_particles,
                "workers": self.model.distribute_strategy.num_workers,
                **self._own_settings(),
            },
        )
        self._begun = time.perf_counter()

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._steps_in_epoch = 0

    def on_test_batch_end(self, batch, logs=None):
        heartbeat.beat()

    def on_train_batch_end(self, batch, logs=None):
        heartbeat.beat()
        if self._history is not self.model.history:
            raise RuntimeError(
                "PSOSync was called for a training that it had not begun. Received: "
                f"{self!r}, which another `fit` has taken over. Make a PSOSync of its "
                "own for each model that is trained at the same time."
            )
        if self._resume_state.skipping:
            return
        if self.model.steps_per_execution == 1:
            self._steps += batch + 1 - self._steps_in_epoch
        else:
            # The last execution of an epoch may hold fewer steps than `batch` says.
            self._steps = self._synchronizer.local_steps()
        self._steps_in_epoch = batch + 1
        if self._steps > self._first_step and not self._warmed_up:
            self._warmed_up = True
            self._synchronizer.find_state()
            with self._barrier("the first local step"):
                self._synchronizer.warm_up(take_mean=self._takes_mean())
        under_way = self._synchronizer.is_under_way
        if under_way and self._steps >= self._synced_steps + self.delay:
            self._unless_all_diverged(self._finish)
        due = self._synced_steps + self.sync_every
        if self._steps > due:
            raise ValueError(
                f"sync_every={self.sync_every} cannot be kept with "
                f"steps_per_execution={self.model.steps_per_execution}: local step "
                f"{due} fell inside an execution that ended at step {self._steps}. "
                "Give each epoch a multiple of `steps_per_execution` steps, or set "
                "steps_per_execution=1."
            )
        if self._steps == due:
            self._unless_all_diverged(
                self._start, *([] if self.delay else [self._finish])
            )

    def on_train_end(self, logs=None):
        averaged = self._takes_mean()
        if averaged:
            self._synchronizer.drop()
        if self._synchronizer.is_under_way:
            self._unless_all_diverged(self._finish)
        if self._steps > self._synced_steps and not averaged:
            self._may_admit = False  # There is nothing left to do for another one.
            self._unless_all_diverged(self._start, self._finish)
        averaged = averaged and not self._diverged
        at_sync = not (averaged or self._diverged)
        self._resume_state.end(self._place() if at_sync else None)
        with self._barrier("the end of training"):
            if self._diverged:
                self._synchronizer.close_on_last()
            else:
                self._synchronizer.close(averaged, forgives=self._stops_on_nan)
        self._history = None
        if self._summaries:
            self._summaries.close()

    def _averages_callback(self):
        """Returns what tells whether moving averages are shown, or `None`."""
        callback_list = tensorflow_internals.calling_list(self)
        swaps = [
            callback
            for callback in getattr(callback_list, "callbacks", ())
            if isinstance(callback, keras.callbacks.SwapEMAWeights)
        ]
        if not swaps:
            return None
        return lambda: tensorflow_internals.shows_moving_averages(swaps)

    def _unless_all_diverged(self, *functions):
        """Calls functions, and stops all workers if a TerminateOnNaN would, on any.

        The particles are then left apart: training ends with what was agreed on last.
        """
        try:
            for function in functions:
                function()
        except divergence.AllDivergedError as error:
            if error.vote < _STOP_ON_NAN:
                raise
            self._diverged = True
            self._synced_steps = self._steps
            self._stop_vote.decide(True)

    def _end_in_backup(self):
        """Backs up what this worker has, where too few are left to go on."""
        place = self._place()
        if self._steps == self._synced_steps + self.sync_every:
            place["synced_steps"] = self._steps  # That synchronisation is left out.
        if self._warmed_up and self._history is self.model.history:
            self._resume_state.end_early(place)

    def _takes_mean(self):
        # Keras puts the moving averages in place of the weights before training ends.
        optimizer = self.model.optimizer
        return getattr(optimizer, "inner_optimizer", optimizer).use_ema

    def _place(self):
        """Returns where training is, right after a synchronisation."""
        return {
            "epoch": self._epoch,
            "steps_in_epoch": self._steps_in_epoch,
            "steps_per_epoch": self._steps_per_epoch(),
            "steps": self._steps,
            "synced_steps": self._synced_steps,
        }

    def _steps_per_epoch(self):
        """Returns the steps of an epoch, `None` where Keras does not know."""
        return (self.params or {}).get("steps")

    def _resume(self, place):
        """Goes on from what `_place` returned once."""
        self._steps_in_epoch = place["steps_in_epoch"]
        self._first_step = self._steps = place["steps"]
        self._synced_steps = place["synced_steps"]

    def _start(self):
        start = time.perf_counter()
        with self._barrier(f"synchronisation {self.num_syncs}"):
            self._synchronizer.start(self._vote())
        self._synced_steps = self._steps
        self._start_epoch = self._epoch
        self._start_seconds = time.perf_counter() - start
        self.sync_seconds += self._start_seconds

    def _finish(self):
        start = time.perf_counter()
        with self._barrier(f"synchronisation {self.num_syncs}"):
            self.fitness = self._synchronizer.finish()
        if self._synchronizer.vote == _STOP:
            self._stop_vote.decide(True)
        sick = np.flatnonzero(np.isinf(self.fitness)).tolist()
        if sick:
            logging.warning(
                "Particles %s were out of order at synchronisation %d. They go on from "
                "what the others agreed on.",
                sick,
                self.num_syncs - 1,
            )
        self._note(time.perf_counter() - start + self._start_seconds)
        self._change_members()
        leaves = self._synchronizer.vote == _GO_AWAY
        if self._is_elastic:  # The others go on.
            leaves = self._resume_state.preempted
        self._resume_state.note_sync(self._place(), leaves)
        self.sync_seconds += time.perf_counter() - start

    def _note(self, seconds):
        """Logs the synchronisation that has ended, which took some seconds."""
        found = self._synchronizer.record
        group = self.model.distribute_strategy.peers
        record = {
            "sync": self.num_syncs - 1,
            "step": self._synced_steps,
            "epoch": self._start_epoch,
            "seconds": time.perf_counter() - self._begun,
            "members": list(group.members if group else self.members),
            **found,
            "working_seconds": max(seconds - found["waiting_seconds"], 0.0),
        }
        self.log.append(record)
        texts = self._alarms.check(record)
        if self.model.distribute_strategy.is_chief:  # All workers see the same.
            for text in texts:
                logging.warning("%s", text)
        if self._progress:
            self._progress.note(record)
        if self._summaries:
            self._summaries.write(record)

    @property
    def _is_elastic(self):
        group = self.model.distribute_strategy.peers
        return group is not None and group.is_elastic

    def _change_members(self):
        """Lets a worker join that waits, and notes who is there."""
        if not self._is_elastic:
            return
        group = self.model.distribute_strategy.peers
        before = self.members
        if group.candidate is not None and self._may_admit:
            self._synchronizer.tell_all_anew()
            with self._barrier(f"synchronisation {self.num_syncs - 1}"):
                group.admit(lambda: self._resume_state.state(self._place()))
        self.members = group.members
        if self._file_writers:
            self._file_writers.leave_to(group.is_chief)
        for verb, workers in {
            "left": set(before) - set(self.members),
            "joined": set(self.members) - set(before),
        }.items():
            if workers:
                logging.warning(
                    "Workers %s %s at synchronisation %d.",
                    sorted(workers),
                    verb,
                    self.num_syncs - 1,
                )

    def on_epoch_end(self, epoch, logs=None):
        if self._is_elastic and logs is not None:
            logs["num_workers"] = len(self.model.distribute_strategy.peers.members)

    def _vote(self):
        if self._resume_state.preempted and not self._is_elastic:
            return _GO_AWAY
        if self._stop_vote.wanted:
            return _STOP
        return _STOP_ON_NAN if self._stops_on_nan else _GO_ON

    def _barrier(self, name):
        return self.model.distribute_strategy.barrier(name)

    def _own_settings(self):
        payload = self.payload_dtype and tf.as_dtype(self.payload_dtype).name
        return {
            "sync_every": self.sync_every,
            "rule": rules.describe(self.rule),
            "non_trainable": self.non_trainable,
            "optimizer_slots": self.optimizer_slots,
            "payload_dtype": payload,
            "delay": self.delay,
        }

    def _settings(self):
        """Returns what has to be the same on all workers."""
        return {
            **fit_checks.settings(self.model),
            **self._own_settings(),
            "backups": self._resume_state.settings,
            "epochs": (self.params or {}).get("epochs"),
        }
