"""Who is there: a quorum by torchft's lighthouse before every step, and what becomes of a lost one."""

import logging
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torchft import Manager

from signsgd_core import check_count

from ..checkpoint.loading import reason_of
from ..vote import PeerLostError, RanksDifferError
from .transport import Members, SafeHTTP

_LOG = logging.getLogger(__name__)
logging.getLogger("torchft.manager").addFilter(lambda record: "flight recorder" not in record.getMessage())
_PAUSE = 0.2
"""Seconds between two attempts to find the lighthouse, or enough workers."""
_JOINED: set[str] = set()
"""Lighthouses at which this process has joined."""


@dataclass(frozen=True)
class Place:
    """Where and how a worker meets the others.

    Attributes:
        lighthouse: its address, "http://host:port".
        min_workers: with fewer of them training waits.
        timeout: how long one that does not answer is waited for.
        hostname: by which the others reach this machine.
    """

    lighthouse: str
    min_workers: int
    timeout: timedelta
    hostname: str


def find_place(lighthouse: str | None, min_workers: int, timeout: timedelta, hostname: str | None) -> Place:
    """Return where and how a worker meets the others, its settings checked.

    Raises:
        ValueError: without a lighthouse, for `min_workers` outside its range, or for a host name that nobody knows.
    """
    address = lighthouse or os.environ.get("TORCHFT_LIGHTHOUSE")
    if not address:
        raise ValueError(
            "an elastic vote needs a lighthouse: start `torchft_lighthouse --min_replicas 1` on one machine, and pass "
            'lighthouse="http://host:29510" or set TORCHFT_LIGHTHOUSE'
        )
    check_count("min_workers", min_workers, 1)
    name = hostname or socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        raise ValueError(
            f"hostname must be a name or an address by which the other workers reach this machine, got {name!r} "
            f"({error}): pass such as hostname='192.168.1.12'"
        ) from error
    return Place(address, min_workers, timeout, name)


@contextmanager
def _alone_at(lighthouse: str) -> Iterator[None]:
    """Be this process's only member at a lighthouse."""
    if lighthouse in _JOINED:
        raise ValueError(
            f"this process takes part in another elastic vote at {lighthouse}, and a lighthouse forms one quorum of "
            "all: start a second lighthouse on another port for it, or close the first vote"
        )
    _JOINED.add(lighthouse)
    try:
        yield
    finally:
        _JOINED.remove(lighthouse)


class Membership:
    """This worker's part in the quorum.

    Args:
        place: where and how.
        workers: are those of the quorum, from `meet` on.
        save: returns the state that is the same on all workers.
        load: goes on from another worker's.
        step: returns how many steps this worker has taken when it joins; those that are behind take over the state of
            one that is ahead.

    Attributes:
        workers: those of the quorum.
    """

    def __init__(
        self,
        place: Place,
        workers: Members,
        save: Callable[[], dict[str, Any]],
        load: Callable[[Mapping[str, Any]], None],
        step: Callable[[], int],
    ) -> None:
        self.workers = workers
        self._place, self._save, self._load, self._step = place, save, load, step
        self._progress = {"batches_committed": 0}  # "step" comes when this worker joins
        self._manager: Manager | None = None
        self._joined = ExitStack()
        self._pending: Mapping[str, Any] | None = None
        self._taken: Mapping[str, Any] | None = None
        self._said = ""
        self._group: object = None

    @property
    def batches(self) -> int:
        """How many batches have been voted on so far, of all workers and steps."""
        return self._progress["batches_committed"] if self._manager is None else self._manager.batches_committed()

    def go_on(self, batches: int) -> None:
        """Begin with a number of batches that were voted on before, in a run that this one goes on with.

        Raises:
            RuntimeError: once this worker has joined.
        """
        if "step" in self._progress:
            raise RuntimeError("this worker has joined the others already: load what was saved before the first step")
        self._progress["batches_committed"] = batches

    def meet(self) -> tuple[bool, bool]:
        """Wait for a quorum of enough workers, however long that takes.

        Returns:
            Whether its workers are others than before, whether this one took over their state.

        Raises:
            RuntimeError: if this worker has another model or other settings, or the others' state is not to be loaded.
            ValueError: if this process is another member of the quorum already.
        """
        healed = False
        while True:
            manager = self._ask()
            if manager is None:
                continue
            if self._pending is not None:
                self._taken, self._pending = self._pending, None
                self._load(self._taken)
                healed = True
            number, size = manager.participating_rank(), manager.num_participants()
            error = manager.errored()
            if isinstance(getattr(error, "original_exception", None), pickle.UnpicklingError):
                self.leave()  # it would be the same state again
                raise RuntimeError(
                    "this worker cannot join, for the others' state has something else than tensors and plain values "
                    f"({reason_of(error.original_exception)}): leave that out of `state` and parameter groups there"
                ) from error
            if error is None and (self.workers.gloo.parent.rank(), self.workers.gloo.size()) != (number, size):
                error = RuntimeError("a lighthouse that was started anew counts its quorums as the old one did")
            if error is not None:
                self.fail(error)
                continue
            if size >= self._place.min_workers:
                break
            self._say(f"training waits: {size} of at least {self._place.min_workers} workers are there")
            time.sleep(_PAUSE)
        self.workers.rank, self.workers.world_size = number, size
        self._say("")
        group, self._group = self._group, self.workers.gloo.parent
        return group is not self._group, healed

    def take_over_again(self) -> None:
        """Go on from the state that was taken over last, whatever was changed since."""
        assert self._taken is not None
        self._load(self._taken)
        self._taken = None

    def commit(self) -> bool:
        """Tell whether this worker may take the step that it has all verdicts of; if so it counts."""
        assert self._manager is not None
        try:
            committed = bool(self._manager.should_commit())
        except (RuntimeError, OSError):  # a newcomer hangs in the middle of its copy
            self.leave()
            return False
        if committed:
            self._taken = None
        return committed

    def fail(self, error: Exception) -> None:
        """Give up the step: let the others know by closing all connections; the next quorum opens new ones."""
        if self._manager is None:
            return
        self._close_connections(error)
        self._manager.report_error(error)
        self.commit()

    def recover(self, error: PeerLostError | RanksDifferError) -> None:
        """Give up this quorum. Those who took a step that the larger party does not know of take over its state."""
        if isinstance(error, RanksDifferError):
            number, size = self.workers.rank, self.workers.world_size
            wrong = error.ranks if len(error.ranks) < size else list(range(1, size))  # no party is larger
            _LOG.warning("workers %s differ from the others in %s, and take over their state", wrong, error.parameter)
            if number in wrong:
                self.start_over()
        self.fail(error)

    def start_over(self) -> None:
        """Take over the others' state with the next quorum, as a newcomer does."""
        if self._manager is not None:
            self._manager.load_state_dict({**self._manager.state_dict(), "step": 0})

    def leave(self) -> None:
        """Leave the quorum; `meet` joins again."""
        manager, self._manager = self._manager, None
        if manager is not None:
            self._joined.close()
            self._progress = manager.state_dict()
            self._close_connections()
            manager.shutdown()

    def _ask(self) -> Manager | None:
        """Ask the lighthouse for a quorum; None if it does not answer."""
        try:
            manager = self._manager = self._manager or self._join()
            # Others may be stuck with a lost worker for the timeout, and come back then. A question that ends just then
            # is answered all the same: with a quorum whose other workers wait for this one, who did not hear of it.
            manager.start_quorum(timeout=2 * self._place.timeout)
            return manager
        except TimeoutError:
            words = f"no quorum yet: the lighthouse at {self._place.lighthouse} hangs, or a worker is slow"
            if self._said == words:  # or this one was stopped in the middle of a question, which nobody answers then
                self.leave()
            self._say(words)
            return None  # to ask again at once: a quorum may be formed just now, with this worker
        except (RuntimeError, OSError) as error:
            reason = (str(error) or " ").splitlines()[0]
            self._say(f"training waits: the lighthouse at {self._place.lighthouse} does not answer ({reason})")
            self.leave()
        time.sleep(_PAUSE)
        return None

    def _join(self) -> Manager:
        """Join as a new member."""
        with ExitStack() as joining:
            joining.enter_context(_alone_at(self._place.lighthouse))
            manager = self._connect()
            self._joined = joining.pop_all()
        return manager

    def _connect(self) -> Manager:
        """Open connections of this membership; nothing of an older one is used again."""
        host, timeout = self._place.hostname, self._place.timeout
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        http = SafeHTTP(timeout, host)
        try:
            manager = Manager(
                pg=self.workers.gloo,
                load_state_dict=self._take_pending,
                state_dict=self._save,
                min_replica_size=self._place.min_workers,
                use_async_quorum=False,
                timeout=timeout,
                quorum_timeout=timeout,
                connect_timeout=timeout,
                rank=0,
                world_size=1,
                store_addr=host,
                store_port=store.port,
                lighthouse_addr=self._place.lighthouse,
                replica_id=f"{host}-{os.getpid()}",
                hostname=host,
                checkpoint_transport=http,
            )
        except BaseException:
            http.shutdown()
            raise
        self._progress.setdefault("step", self._step())
        manager.load_state_dict(self._progress)
        self._store = store  # it lives as long as the membership
        return manager

    def _close_connections(self, error: BaseException | None = None) -> None:
        """Close those to the others: Gloo does so when nothing holds the group any more, nor one of its messages."""
        self._group = None
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        self.workers.gloo.abort()

    def _take_pending(self, state: Mapping[str, Any]) -> None:
        self._pending = state

    def _say(self, what: str) -> None:
        """Say once that training waits, and that it goes on."""
        if what and what != self._said:
            _LOG.warning(what)
        elif self._said and not what:
            _LOG.warning("training goes on with %d workers", self.workers.world_size)
        self._said = what
