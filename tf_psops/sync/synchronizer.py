"""One synchronisation: what all particles bring, what travels, where they move."""

import contextlib
import functools
import math
import time
from concurrent import futures

import numpy as np
import tensorflow as tf

from tf_psops.rules import rule as rule_lib
from tf_psops.sync import async_work, divergence, loss_tracker, model_state
from tf_psops.sync.compiled_rule import CompiledRule
from tf_psops.sync.particles import Particles
from tf_psops.sync.reduction import Reduction
from tf_psops.sync.sync_graph import SyncGraph
from tf_psops.transport import initial_values

# What a swarm has of its past besides the particles.
_PROGRESS = ("num_syncs", "num_diverged", "bytes_moved", "_sent")


class Synchronizer:
    """Moves the particles of a swarm by a rule.

    All workers must take part in `begin`, `start`, `finish`, `tell` and `close`.

    Args:
        strategy: A `SwarmStrategy`.
        model: The compiled and built `keras.Model` that was made in its scope.
        rule: A `Rule`.
        average_non_trainable: Whether non-trainable state is averaged.
        average_slots: Whether the optimizers' slots are averaged.
        payload_dtype: The name of the float type in which the vector of a
            synchronisation travels, or `None` for that of the weights.
        delayed: Whether particles may take local steps between `start` and `finish`.
        rescale_moments: Whether the second moments among the slots are rescaled.

    Attributes:
        record: What is known of the last synchronisation, a dict of plain numbers; see
            `PSOSync.log`.
    """

    def __init__(
        self,
        strategy,
        model,
        rule,
        average_non_trainable,
        average_slots,
        payload_dtype=None,
        delayed=False,
        rescale_moments=False,
    ):
        self._strategy = strategy
        self._model = model
        self._rule = CompiledRule(rule)
        self._delayed = delayed
        self._average_non_trainable = average_non_trainable
        self._average_slots = average_slots
        self._payload_dtype = payload_dtype
        self._rescale_moments = rescale_moments
        self._shows_averages = None
        self._collectives = strategy.collectives
        self._loss_tracker = loss_tracker.LossTracker(strategy, model)
        self._build(model_state.find(strategy, model))
        self._under_way = None
        self._apart = False
        self._is_state_known = False
        self._sent = None
        self.vote = 0
        self.num_diverged = 0
        self.num_syncs = 0
        self.bytes_moved = 0
        self.record = {}
        self._waited = math.nan  # In the last synchronisation, if there was one.

    def _build(self, found):
        """Makes what the variables of the model decide on.

        Args:
            found: A `ModelState`.
        """
        self._found = found, self._shows_averages is not None
        self._particles = Particles(
            self._strategy,
            found,
            self._rule,
            self._collectives.first_particle,
            self._average_non_trainable,
            self._average_slots,
            average_averages=self._shows_averages is not None,
            rescale_moments=self._rescale_moments,
        )
        self._payload = tf.as_dtype(self._payload_dtype or self._particles.dtype)
        self._reduction = Reduction(
            self._collectives, self._particles, self._rule, self._payload
        )
        self._graph = SyncGraph(
            self._rule,
            self._collectives,
            self._particles,
            self._loss_tracker,
            self._delayed,
        )

    def find_state(self):
        """Takes account of what training has shown to be state of the model.

        Variables may be made in the first step, and which ones are moved without
        gradients is only known from there on.

        Raises:
            ValueError: If training changes what was not made in the strategy's scope.
        """
        before, averages_before = self._found
        found = model_state.find(self._strategy, self._model, before)
        model_state.check_outside(self._strategy, self._model, found)
        averages = self._shows_averages is not None
        self._is_state_known = bool(self.local_steps())
        if found.identity == before.identity and averages == averages_before:
            return
        previous = self._particles
        self._build(found)
        self._particles.take_over(previous)

    @property
    def num_particles(self):
        """Returns W, the number of particles on all workers."""
        return self._collectives.num_particles

    @property
    def local_particles(self):
        """Returns the range of the local particles' indices."""
        return self._particles.indices

    def tell(self, row):
        """Returns what the worker of each particle that is there tells, [W, 3].

        Args:
            row: Three numbers of this worker, the same for all of its particles.
        """
        self._wait()
        rows = [np.array(row, float)] * len(self.local_particles)
        return _present(self._collectives.tell(rows))

    def any_worker(self, flag):
        """Returns whether any worker gave `True`, on all workers the same."""
        return bool(self.tell([flag, 0, 0])[:, 0].any())

    def local_steps(self):
        """Returns the local steps of this worker's first particle, an int."""
        return self._loss_tracker.num_steps(0)

    def particles(self):
        """Returns the variables that each local particle is made of, lists."""
        return [
            [*variables, *map(self._loss_tracker.sums, self._particles.replicas(place))]
            for place, variables in enumerate(self._particles.variables())
        ]

    def progress(self):
        """Returns what the synchronisations have come to, to `restore` it."""
        return {name: getattr(self, name) for name in _PROGRESS}

    def restore(self, progress, arrays, newcomers):
        """Puts the swarm back to where it was.

        Args:
            progress: A dict from `progress`.
            arrays: For each local particle the values of its variables as in
                `particles`, in a newcomer's place those of another particle.
            newcomers: Indices of the local particles that were not in the swarm. They
                start from the position that stands for it, with fresh slots.
        """
        for name in _PROGRESS:
            setattr(self, name, progress[name])
        if newcomers:
            self._sent = None
        count = len(self._particles.replicas(0))
        for place, values in enumerate(arrays):
            sums = map(self._loss_tracker.sums, self._particles.replicas(place))
            for variable, value in zip(sums, values[-count:], strict=True):
                variable.assign(value)
        self._particles.restore([values[:-count] for values in arrays], newcomers)

    def begin(self, shows_averages=None):
        """Puts all particles on the first one's position, at rest.

        Args:
            shows_averages: A function that tells whether a callback has put moving
                averages of the weights in their place, or `None` without one.
        """
        self.num_diverged = 0
        self.come_to_rest()
        self._shows_averages = shows_averages
        self.find_state()
        self._put_on_first(self._particles.that_may_differ(everything=True))
        self._particles.rest()
        self._particles.each(self._loss_tracker.begin)
        self._particles.note_start()
        self._particles.heed_what_is_set(True)
        self._apart = True
        self._sent = None
        self.num_syncs = 0
        self.bytes_moved = 0
        self._waited = math.nan

    def warm_up(self, take_mean):
        """Synchronises and closes once alone, and takes it back: all is then compiled.

        Args:
            take_mean: See `close`.
        """
        with self._collectives.alone():
            self._warm_up(take_mean)

    def _warm_up(self, take_mean):
        variables = tf.nest.flatten(self._loss_tracker.variables)
        values = [variable.read_value() for variable in variables]
        rows, positions, offers, states, own = self._graph.report()
        # Only now, because `report` lets weights and positions share their memory.
        changed = tf.nest.flatten(self._particles.changed())
        variables += changed
        values += [variable.read_value() for variable in changed]
        zeros = np.zeros(len(self._collectives.tell(rows)))
        news = self._news(zeros, 0, zeros)
        travelled = self._reduction.travel(
            offers, own, news, tf.constant(0), tf.constant(True)
        )
        self._graph.settle(news, positions, states, own, *travelled)
        del positions, offers, states, own, travelled
        self._graph.close(take_mean)
        while variables:
            variables.pop().assign(values.pop())
        self._particles.take_back(self._particles.show_agreed())

    def rest(self):
        """Makes what the particles have now, all the same, what was agreed on.

        For weights that the user has set. No collective runs.
        """
        self.drop()
        self._particles.rest()
        self._particles.forget_set()
        self._sent = None

    def come_to_rest(self):
        """Leaves the particles on what stands for the swarm if training was cut short.

        No collective runs.
        """
        self.drop()
        if self._apart:
            self._show_agreed()
            self._end_training()

    def _average_what_differs(self, everything):
        """Averages what the training step does not move, but something else did.

        Callbacks do, which on each worker see the weights of its first particle.

        Args:
            everything: Whether they have set what training moves, too.
        """
        variables = self._particles.that_may_differ(everything)
        if not variables:
            return
        table = self._collectives.tell(self._particles.digests(variables))
        present = ~np.isnan(table[:, 0])
        differs = (table[present] != table[present][0]).any(axis=0)
        if differs.any():
            flat = self._particles.flat(
                [v for v, is_chosen in zip(variables, differs) if is_chosen]
            )
            means = self._collectives.mean(
                self._particles.each(flat.pack), tf.constant(present)
            )
            self._particles.each(lambda replica: flat.unpack(replica, means[replica]))

    def _end_training(self):
        self._apart = False
        self._particles.heed_what_is_set(False)

    def close(self, take_mean, forgives=False):
        """Puts all particles on the position that stands for the swarm.

        Args:
            take_mean: Whether that is the mean of the positions as they are now, for
                weights that are moving averages, and not what the rule agreed on.
            forgives: Whether this worker would go on from what was agreed on last where
                no particle is left in good health. One of all workers suffices.
        """
        finite, any_healthy = self._graph.close(take_mean)
        if not any_healthy:
            if not self.any_worker(forgives):
                raise divergence.AllDivergedError(
                    "No particle has finite weights, or moving averages of them, at "
                    "the end of training. Lower the learning rate, or clip the "
                    "gradients.",
                    0,
                )
            self.close_on_last()
            return
        # After the last synchronisation, as in a last validation.
        was_set = not take_mean and self._particles.assign_set()
        self._average_what_differs(self.any_worker(was_set))
        self._take_counts()
        self._end_training()
        self._check_finite(finite, "agreed")
        if take_mean:
            self.num_syncs += 1
            self.bytes_moved += self._particles.weights.num_bytes

    def close_on_last(self):
        """Puts all particles on what was agreed on last, with the state of then."""
        self.drop()
        self._particles.forget_training()
        self._take_counts()
        self._end_training()

    def _take_counts(self):
        """Takes the first particle's values of what has no mean."""
        self._put_on_first(self._particles.counts())

    def _put_on_first(self, variables):
        """Gives all particles the first one's values of some variables."""
        self._particles.take_first(variables)
        if variables and self._strategy.peers:
            initial_values.share(self._strategy, variables)

    @contextlib.contextmanager
    def agreed(self):
        """Puts the position that stands for the swarm in place of the particles' own.

        It is the one that the last synchronisation left, on every worker the same; no
        collective runs. On leaving, each particle gets its own back. Inside `agreed`,
        and outside of training, nothing changes hands.
        """
        if not self._apart:
            yield
            return
        shown = self._show_agreed()
        self._apart = False
        try:
            yield
        finally:
            self._particles.take_back(shown, self._has_averages())
            self._apart = True

    def _show_agreed(self):
        if not self._is_state_known and self.local_steps():
            self.find_state()
        return self._particles.show_agreed(self._has_averages())

    def _has_averages(self):
        return self._shows_averages is not None and self._shows_averages()

    @property
    def is_under_way(self):
        """Returns whether a synchronisation has been started and not finished."""
        return self._under_way is not None

    def start(self, vote=0):
        """Lets what the particles bring to a synchronisation travel.

        Args:
            vote: A number that this worker tells the others. The largest of all is in
                `vote` after `finish`.
        """
        rows, positions, offers, states, own = self._graph.report()
        told = vote, self._waited
        moving = async_work.run(
            functools.partial(self._travel, rows, told, offers, own),
            in_background=self._delayed,
        )
        self._under_way = (positions, states, own), moving

    def _travel(self, rows, told, offers, own):
        """Meets the other workers, and lets what is best for all travel.

        Nothing here changes what training sees, which may go on meanwhile.
        """
        return self._collectives.together(
            functools.partial(self._travel_once, rows, told, offers, own), admits=True
        )

    def _travel_once(self, rows, told, offers, own):
        rows = [np.append(row, told) for row in rows]  # Once they are computed.
        start = time.perf_counter()
        table = self._collectives.tell(rows)
        waiting = time.perf_counter() - start
        fitness, scores, steps, distances, sampled, rates, votes, waited = table.T
        self._check_steps(steps)
        present = ~np.isnan(steps)
        unknown = np.isnan(fitness) & present
        if unknown.any() and self._rule.needs_fitness:
            self._check_known(unknown[present])
            fitness, unknown = np.where(unknown, np.inf, fitness), unknown & False
        fitness = np.where(unknown, 0, fitness)
        if not np.isfinite(fitness).any():
            raise divergence.AllDivergedError(
                "No particle has a finite training loss and finite weights at "
                f"synchronisation {self.num_syncs}. Received the losses "
                f"{fitness.tolist()}. Lower the learning rate, or clip the gradients.",
                int(votes[present].max()),
            )
        sick = divergence.have_diverged(fitness, distances)
        fitness = np.where(sick & present, np.inf, fitness)
        heard = distances, waiting, waited[:: len(self.local_particles)]
        sampled = np.where(sick, np.inf, sampled)
        root = int(np.where(sick, np.inf, scores).argmin())
        best = (root, float(scores[root]))
        # Particles that skipped a step, because of its loss scale, are behind in it.
        rate = rates[np.isfinite(fitness)].mean()
        news = self._news(fitness, rate, sampled)
        travelled = self._reduction.travel(
            offers, own, news, tf.constant(root), tf.constant(best != self._sent)
        )
        num_bytes = table.nbytes + self._particles.averaged.num_bytes
        if self._rule.exchange == "mean" or best != self._sent:
            num_bytes += self._particles.weights.size * self._payload.size
        vote = int(votes[present].max())
        return fitness, unknown, best, vote, num_bytes, (news, travelled), heard

    def _news(self, fitness, learning_rate, distances):
        """Returns what all particles learn, for each of them to add the rest."""
        dtype = self._particles.dtype
        return rule_lib.News(
            vector=None,
            fitness=tf.constant(np.where(np.isnan(fitness), np.inf, fitness), dtype),
            particle=None,
            sync=tf.constant(self.num_syncs),
            learning_rate=tf.constant(learning_rate, dtype),
            distances=tf.constant(distances, dtype),
        )

    def finish(self):
        """Waits for what travels, and moves the particles by it.

        A particle that has gone on since `start` keeps that way, from where it is put.

        Returns:
            The fitness of every particle, a NumPy array [W]; infinite for one out of
            order, NaN where its loss is unknown or its worker is not there.

        Raises:
            ValueError: If no loss is known, and the rule needs it.
            FloatingPointError: If no particle is in good health, or the rule gives a
                position that is not finite.
            RuntimeError: If the particles are not at the same step.
        """
        (brought, moving), self._under_way = self._under_way, None
        start = time.perf_counter()
        result = moving.result()
        waited = time.perf_counter() - start
        fitness, unknown, self._sent, self.vote, num_bytes, learnt, heard = result
        news, travelled = learnt
        self.num_diverged += int(np.isinf(fitness).sum())
        self.bytes_moved += num_bytes
        finite, measures = self._graph.settle(news, *brought, *travelled)
        self._check_finite(finite, "move")
        self._particles.forget_set()
        fitness = np.where(unknown & np.isfinite(fitness), np.nan, fitness)
        distances, waiting, waited_before = heard
        self._waited = waited if self._delayed else waiting
        self.record = {
            "sync": self.num_syncs,
            "fitness": list(map(_plain, fitness)),
            "distances": list(map(_plain, distances)),
            "diverged": np.flatnonzero(np.isinf(fitness)).tolist(),
            "measures": {n: _plain(value.numpy()) for n, value in measures.items()},
            "bytes": int(num_bytes),
            "waited": list(map(_plain, waited_before)),
            "waiting_seconds": self._waited,
        }
        self.num_syncs += 1
        return fitness

    def tell_all_anew(self):
        """Lets the next vector travel though it is the last one: one worker is new."""
        self._sent = None

    def drop(self):
        """Forgets a synchronisation that is under way; its transfer ends first."""
        if self.is_under_way:
            futures.wait([self._under_way[1]])
            self._under_way = None

    def _wait(self):
        """Waits for what travels: nothing else may meanwhile."""
        if self.is_under_way:
            self._under_way[1].result()

    def barrier(self):
        """Makes sure that, in training, all workers end an epoch or evaluate at once.

        Raises:
            RuntimeError: If another one is at a synchronisation or at another step.
        """
        if self._apart and self._strategy.num_workers > 1:
            with self._strategy.barrier("the end of an epoch, or an evaluation"):
                self._wait()
                # Half a step more than at a synchronisation.
                rows = [
                    np.array(
                        [0, 0, self._loss_tracker.num_steps(replica) + 0.5, *[0] * 5]
                    )
                    for replica in range(len(self.local_particles))
                ]
                self._check_steps(self._collectives.tell(rows)[:, 2])

    def _check_steps(self, steps):
        steps = steps[~np.isnan(steps)]
        if steps.min() != steps.max():
            met = [
                f"{int(step)}{' (end of epoch, or evaluation)' if step % 1 else ''}"
                for step in steps
            ]
            raise RuntimeError(
                f"The particles met for synchronisation {self.num_syncs} after "
                f"different numbers of local steps: [{', '.join(met)}], in the order "
                "of the particles. Expected the same number. Give every worker a "
                "dataset of as many batches, and call `evaluate` on all workers."
            )

    def _check_known(self, unknown):
        """Raises an error if no particle's loss is known."""
        if unknown.all():
            raise ValueError(
                f"The rule {self._rule.name} needs the training loss of every "
                "particle. Received: a model whose `train_step` neither updates Keras' "
                'loss tracker, nor a `keras.metrics.Mean` named "loss" in '
                '`model.metrics`, nor returns a loss under the name "loss". Let it '
                'return {"loss": ...}, or take a rule that needs no fitness, such as '
                "tf_psops.ParameterAverage()."
            )

    def _check_finite(self, finite, function):
        """Raises an error if what the rule made of finite positions is not finite."""
        finite = [flag.numpy() for flag in finite]
        if all(finite):
            return
        indices = self._particles.indices
        finite = np.reshape(finite, [len(indices), -1]).all(axis=1)
        sick = indices.start + np.flatnonzero(~finite)
        error = FloatingPointError(
            f"The rule {self._rule.name} gave particles {sick.tolist()} "
            "a position that is not finite, at synchronisation "
            f"{self.num_syncs}, from `{function}`. Expected finite weights. Look "
            "for a division by zero, a root or a logarithm in the rule, or take a "
            "rule of tf_psops."
        )
        error.is_known_to_all = False  # Only to the worker of the particle.
        raise error


def _plain(number):
    """Returns a number as Python's own, `None` where it is not finite."""
    return float(number) if math.isfinite(number) else None


def _present(table):
    """Returns the rows of a table that are not of a worker that is not there."""
    return table[~np.isnan(table).all(axis=1)]
