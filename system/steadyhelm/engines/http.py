"""HTTP to one engine server, with our errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Literal
from urllib.parse import urlsplit

import aiohttp

from steadyhelm.errors import ConfigError, DataError, DeadlineError, EngineLostError, RetryableError

HEALTH = "/health"
CONNECT_S = 5.0
HEALTH_S = 5.0
WATCH_S = 1.0
"""Seconds between two looks at a server: how late its end is noticed where nothing is asked of it."""
KEEP_ALIVE_S = 2.0
"""Shorter than the servers' own 5 s, so that no request goes into a connection that the server is closing."""
SHOWN_CHARACTERS = 600
BUSY = frozenset({408, 425, 429})
"""Statuses that are no refusal of what is asked: the server, or what stands before it, cannot take it now."""


class EngineServer:
    """One engine server, by its URL.

    Args:
        url: ``http://host:port``.
        key: bearer token; empty for none.
        ended: resolves with the end of the server's log where its process ended; None for a server of somebody else.
        log: the end of its log so far; None for a server of somebody else.
        connect_s: longest time for a connection, before it is tried again where the server is still there.
        on_lost: called once, with the error that every call raises from then on.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str,
        ended: Future[str] | None,
        on_lost: Callable[[EngineLostError], None],
        log: Callable[[], str] | None = None,
        connect_s: float = CONNECT_S,
    ) -> None:
        self.url = url.rstrip("/")
        self._key = key
        self._ended = ended
        self._log = log
        self._connect_s = connect_s
        self._failing = asyncio.Lock()
        self._on_lost = on_lost
        self._lost: EngineLostError | None = None
        self._session: aiohttp.ClientSession | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def lost(self) -> EngineLostError | None:
        """Why the server is of no use any more; None while it is."""
        return self._lost

    def lose(self, why: str) -> EngineLostError:
        """Gives the server up; returns the error that says so."""
        if self._lost is None:
            self._lost = EngineLostError(f"The engine server at {self.url} is lost: {why}")
            self._on_lost(self._lost)
        return self._lost

    async def get(self, path: str, *, deadline_s: float = HEALTH_S) -> Any:
        """The JSON answer (None where it is no JSON) to a GET; see ``post`` for the errors."""
        return await self._call("GET", path, None, deadline_s)

    async def post(self, path: str, body: Mapping[str, Any] | None = None, *, deadline_s: float) -> Any:
        """The JSON answer (None where it is no JSON) to a POST; cancelled, it closes the connection.

        Raises:
            DataError: the server refuses the request (status 4xx).
            DeadlineError: no answer within ``deadline_s``.
            EngineLostError: the server is gone.
            RetryableError: the connection broke or the server failed (status 5xx), but it serves; or it has too much to
                do (``BUSY``).
        """
        return await self._call("POST", path, body, deadline_s)

    async def health(self) -> None:
        """Returns where the server answers that it serves. Raises EngineLostError."""
        if self._lost is not None:
            raise self._lost
        try:
            await self.get(HEALTH)
        except EngineLostError:
            raise
        except (RetryableError, DataError) as error:
            raise EngineLostError(f"The engine server at {self.url} does not answer: {error}") from error

    async def close(self) -> None:
        """Closes the connections."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._session is not None:
            await self._session.close()

    async def _call(
        self, method: Literal["GET", "POST"], path: str, body: Mapping[str, Any] | None, deadline_s: float
    ) -> Any:
        end = time.monotonic() + deadline_s
        while True:
            if self._lost is not None:
                raise self._lost
            try:
                return await self._ask(method, path, body, end)
            except aiohttp.ConnectionTimeoutError as error:  # on a busy machine, with nothing sent yet
                if await self._is_gone():
                    raise self.lose(f"it takes no connection within {self._connect_s:g} s") from error
                if time.monotonic() < end:
                    continue
                raise self._late(path, deadline_s) from error
            except TimeoutError as error:
                raise self._late(path, deadline_s) from error

    def _late(self, path: str, deadline_s: float) -> DeadlineError:
        return DeadlineError(f"No answer from {self.url}{path} within its deadline of {deadline_s:g} s.")

    async def _ask(
        self, method: Literal["GET", "POST"], path: str, body: Mapping[str, Any] | None, end_s: float
    ) -> Any:
        """One try, until ``end_s``. Raises TimeoutError, and the errors of ``post`` but DeadlineError."""
        left_s = max(end_s - time.monotonic(), 0.001)
        timeout = aiohttp.ClientTimeout(total=left_s, sock_connect=self._connect_s)
        try:
            async with self._open().request(method, self.url + path, json=body, timeout=timeout) as answer:
                if answer.status == 200:
                    return _json(await answer.read())
                text = (await answer.text(errors="replace"))[:SHOWN_CHARACTERS]
        except TimeoutError:
            raise
        except aiohttp.ClientError as error:
            if await self._is_gone():
                raise self.lose(f"it does not answer ({error})") from error
            raise RetryableError(f"The connection to {self.url}{path} broke ({error}): asked again") from error
        if answer.status >= 500:
            why = f"{path} failed with status {answer.status}: {text}"
            if path == HEALTH or not await self._serves():
                raise await self._lose_with_log(why)
            raise RetryableError(f"The engine server at {self.url} serves, but {why}: asked again", delay_s=0.5)
        if answer.status in BUSY:
            raise RetryableError(
                f"The engine server at {self.url} takes no request to {path} now ({answer.status}): asked again",
                delay_s=0.5,
            )
        raise DataError(f"The engine server at {self.url} refuses a request to {path} ({answer.status}): {text}")

    def _open(self) -> aiohttp.ClientSession:
        """The connections; the first call makes them and begins to watch."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            )
            self._watcher = asyncio.create_task(self._watch(), name=f"watch of {self.url}")
        return self._session

    async def _watch(self) -> None:
        """Loses the server within ``WATCH_S`` of its end; one that is merely slow to answer stays."""
        while self._lost is None:
            if self._ended is None:
                await asyncio.sleep(WATCH_S)
                if await self._is_gone():
                    self.lose("it no longer listens")
            else:
                tail = await asyncio.shield(asyncio.wrap_future(self._ended))
                self.lose(f"its process ended; the end of its log:\n{tail}")

    async def _serves(self) -> bool:
        try:
            await self.health()
        except EngineLostError:
            return False
        return True

    async def _lose_with_log(self, why: str) -> EngineLostError:
        """``lose`` of a server that failed inside, with the end of its log, which is read once."""
        async with self._failing:
            if self._lost is None and self._log is not None:
                await self._is_gone()  # most end soon, and say why before
                why += f"; the end of its log:\n{await asyncio.to_thread(self._log)}"
            return self.lose(why)

    async def _is_gone(self) -> bool:
        """Whether nobody listens at the server's address, or its process has ended."""
        if self._ended is not None:
            done, _ = await asyncio.wait({asyncio.wrap_future(self._ended)}, timeout=WATCH_S)
            return bool(done)
        place = urlsplit(self.url)
        try:
            async with asyncio.timeout(CONNECT_S):
                _, writer = await asyncio.open_connection(
                    place.hostname, place.port or (443 if place.scheme == "https" else 80)
                )
        except OSError:
            return True
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return False


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


@contextlib.contextmanager
def understood(server: EngineServer, name: str) -> Iterator[None]:
    """While an answer of ``server``, a ``name``, is taken apart. Raises ConfigError where it is built otherwise."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"The server at {server.url} answers otherwise than the {name} that Steadyhelm is made for "
            f"({type(error).__name__}: {error}): install the version that 'make engines' does"
        ) from error
