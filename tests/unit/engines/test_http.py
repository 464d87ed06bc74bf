"""What an engine server's answers become, over a real HTTP server."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from aiohttp import web
from steadyhelm.data.types import Sampling
from steadyhelm.engines.http import EngineServer
from steadyhelm.errors import ConfigError, DataError, DeadlineError, EngineLostError, RetryableError
from steadyhelm.services.rollout.served import Ask, Dialect
from steadyhelm.services.rollout.sglang import SglangDialect
from steadyhelm.services.rollout.vllm import VllmDialect


class Site:
    """An engine server's routes; ``healthy`` is what /health says."""

    def __init__(self) -> None:
        self.healthy = True
        self.answer = ""
        self.cancelled = asyncio.Event()
        self.runner: web.AppRunner | None = None
        self.lost: list[EngineLostError] = []

    async def open(self, listening: socket.socket | None = None) -> str:
        app = web.Application()
        app.router.add_get("/health", self.health)
        app.router.add_post("/echo", self.echo)
        app.router.add_post("/refuse", self.refuse)
        app.router.add_post("/break", self.fail)
        app.router.add_post("/sleep", self.sleep)
        app.router.add_post("/empty", self.empty)
        app.router.add_post("/status/{status}", self.status)
        app.router.add_post("/{path:.*}", self.other)
        self.runner = web.AppRunner(app, handler_cancellation=True)
        await self.runner.setup()
        site = web.SockSite(self.runner, listening or socket.create_server(("127.0.0.1", 0)))
        await site.start()
        return f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503, text="OK")

    async def echo(self, request: web.Request) -> web.Response:
        return web.json_response({"got": await request.json(), "as": request.headers.get("Authorization")})

    async def refuse(self, _: web.Request) -> web.Response:
        return web.Response(status=400, text="prompt is too long")

    async def fail(self, _: web.Request) -> web.Response:
        return web.Response(status=500, text="no memory")

    async def empty(self, _: web.Request) -> web.Response:
        return web.Response()

    async def status(self, request: web.Request) -> web.Response:
        return web.Response(status=int(request.match_info["status"]), body=b"\xff\xfe\x80", content_type="text/plain")

    async def other(self, request: web.Request) -> web.Response:
        return web.Response(text=self.answer)

    async def sleep(self, _: web.Request) -> web.Response:
        try:
            await asyncio.sleep(60)
        finally:
            self.cancelled.set()
        return web.Response()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    made = Site()
    yield made
    assert made.runner is not None
    await made.runner.cleanup()


@pytest.fixture
async def server(site: Site) -> AsyncIterator[EngineServer]:
    made = EngineServer(await site.open(), key="secret", ended=None, on_lost=site.lost.append)
    yield made
    await made.close()


async def test_json_goes_out_and_comes_back_with_the_key(server: EngineServer) -> None:
    assert await server.post("/echo", {"a": [1]}, deadline_s=5) == {"got": {"a": [1]}, "as": "Bearer secret"}
    assert await server.post("/empty", deadline_s=5) is None


async def test_a_refused_request_is_an_error_of_its_data(server: EngineServer) -> None:
    with pytest.raises(DataError, match=r"/refuse \(400\): prompt is too long"):
        await server.post("/refuse", deadline_s=5)


async def test_a_failure_of_a_server_that_serves_may_be_tried_again(server: EngineServer) -> None:
    with pytest.raises(RetryableError, match="500: no memory") as caught:
        await server.post("/break", deadline_s=5)
    assert not isinstance(caught.value, EngineLostError)
    assert server.lost is None


async def test_a_failure_of_a_server_that_says_so_loses_it_once_and_for_all(server: EngineServer, site: Site) -> None:
    site.healthy = False
    with pytest.raises(EngineLostError, match="503"):
        await server.post("/break", deadline_s=5)
    site.healthy = True
    with pytest.raises(EngineLostError, match="503"):
        await server.health()
    assert len(site.lost) == 1


async def test_a_failure_inside_comes_with_the_log_which_is_read_once(site: Site) -> None:
    read: list[int] = []

    def log() -> str:
        read.append(1)
        return "RuntimeError: no such kernel"

    site.healthy = False
    server = EngineServer(await site.open(), key="", ended=Future(), on_lost=site.lost.append, log=log)
    calls = [server.post("/break", deadline_s=20) for _ in range(8)]
    failed = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(error) for error in failed} == {EngineLostError}
    assert all("no such kernel" in str(error) for error in failed)
    assert len(read) == 1
    await server.close()


async def test_health_may_be_said_in_any_words(server: EngineServer, site: Site) -> None:
    await server.health()
    site.answer = "<html>"
    assert await server.post("/whatever", deadline_s=5) is None


@pytest.mark.parametrize("status", [408, 425, 429, 500])
async def test_a_server_that_cannot_now_is_asked_again_whatever_bytes_it_says_so_with(
    server: EngineServer, status: int
) -> None:
    with pytest.raises(RetryableError, match=str(status)):
        await server.post(f"/status/{status}", deadline_s=5)
    assert server.lost is None


ASK = Ask(
    name="0:1",
    tokens=[1],
    images=(),
    expanded=1,
    seed=1,
    sampling=Sampling(max_new_tokens=2),
    banned_ids=(),
    eos_ids=(2,),
)
OTHERWISE = ("", "OK", "[]", "{}", '{"choices": []}', '{"meta_info": {}}', '{"results": [{}], "message": "ok"}')


@pytest.mark.parametrize("answer", OTHERWISE)
@pytest.mark.parametrize(("dialect", "name"), [(VllmDialect(), "vLLM"), (SglangDialect(), "SGLang")])
async def test_a_server_of_another_version_is_told_as_such(
    server: EngineServer, site: Site, dialect: Dialect, name: str, answer: str
) -> None:
    site.answer = answer
    for call in (dialect.complete(server, ASK, 5.0), dialect.stage(server, Path("weights"), "digest")):
        with pytest.raises(ConfigError, match=f"answers otherwise than the {name} .* install the version"):
            await call


async def test_a_late_answer_is_a_missed_deadline(server: EngineServer) -> None:
    with pytest.raises(DeadlineError, match=r"0\.05 s"):
        await server.post("/sleep", deadline_s=0.05)


async def test_a_connection_that_a_busy_server_takes_late_is_tried_again_and_loses_nothing(site: Site) -> None:
    listening = socket.create_server(("127.0.0.1", 0), backlog=0)
    port = listening.getsockname()[1]
    server = EngineServer(f"http://127.0.0.1:{port}", key="", ended=Future(), on_lost=site.lost.append, connect_s=0.2)
    with contextlib.ExitStack() as waiting:
        for _ in range(3):  # the kernel takes no more until somebody accepts these
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        call = asyncio.create_task(server.post("/echo", {"n": 1}, deadline_s=60))
        done, _ = await asyncio.wait({call}, timeout=1.5)
        assert not done, done
        await site.open(listening)
        assert (await call)["got"] == {"n": 1}
    assert site.lost == []
    await server.close()


async def test_a_cancelled_request_is_cancelled_at_the_server(server: EngineServer, site: Site) -> None:
    call = asyncio.create_task(server.post("/sleep", deadline_s=30))
    await asyncio.sleep(0.1)
    call.cancel()
    await asyncio.wait_for(site.cancelled.wait(), 10)


async def test_nobody_at_the_address_means_that_the_server_is_lost(site: Site) -> None:
    url = await site.open()
    await site.runner.cleanup()
    server = EngineServer(url, key="", ended=None, on_lost=site.lost.append)
    with pytest.raises(EngineLostError, match="does not answer"):
        await server.post("/echo", {}, deadline_s=5)
    await server.close()


async def test_a_process_that_ends_is_noticed_though_nothing_is_asked(site: Site) -> None:
    ended: Future[str] = Future()
    noticed = asyncio.Event()
    server = EngineServer(await site.open(), key="", ended=ended, on_lost=lambda _: noticed.set())
    await server.health()
    ended.set_result("out of memory")
    await asyncio.wait_for(noticed.wait(), 5)
    assert server.lost is not None
    assert "out of memory" in str(server.lost)
    await server.close()
