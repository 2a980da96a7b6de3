"""Hours of uploads, deletions, requests and clients that leave: does anything grow?

    python -m tests.reliability.soak --hours 4

Looks at the server's process every few seconds. For the first fifth nobody pauses: what is bounded
(SQLite's pages, the heaps of threads) is full sooner than in hours of the pace that follows. The
slope of memory is that of a line through the looks after it, with the interval in which it lies
with 95 % (from the differences between parts of the run, since looks near each other are alike).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean, linear_regression, median, stdev

from adapters.limits import MIB
from tests.reliability.clients import Client, Lost, generate, request
from tests.reliability.served import Seen, Served, serving

NAMES = tuple(f"adapter-{number}" for number in range(8))
LOOK_SECONDS = 5.0
WARM = 0.2  # of the run, without pauses
PARTS = 8  # of the rest
FLAGS = (
    *("--kv-cache-bytes", "8MiB", "--slot-bytes", "1MiB", "--host-cache-bytes", "1MiB"),
    *("--max-queue", "64"),
)
# What may come of what is done here: 404 for what was just deleted.
FINE = {200, 201, 404, 422, 503, 507}


@dataclass(slots=True)
class Soak:
    """What was done, and what was seen meanwhile."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    looks: list[Seen] = field(default_factory=list)

    @property
    def settled(self) -> list[Seen]:
        return self.looks[int(len(self.looks) * WARM) :]

    def slope(self) -> tuple[float, float]:
        """MiB an hour, and half of its interval."""
        looks = self.settled
        whole = _slope(looks)
        size = len(looks) // PARTS
        if size < 2:
            return whole, float("inf")
        means = [_mean(looks[part * size : (part + 1) * size]) for part in range(PARTS)]
        x = [hours for hours, _ in means]
        fit = linear_regression(x, [mib for _, mib in means])
        rest = [mib - fit.slope * hours - fit.intercept for hours, mib in means]
        spread = sum((one - fmean(x)) ** 2 for one in x) ** 0.5
        return whole, 2.45 * stdev(rest) * ((PARTS - 1) / (PARTS - 2)) ** 0.5 / spread

    def grown(self, what: Callable[[Seen], float]) -> tuple[float, float]:
        """The median at the beginning and at the end."""
        looks, third = self.settled, max(1, len(self.settled) // 3)
        return median(map(what, looks[:third])), median(map(what, looks[-third:]))

    def __str__(self) -> str:
        mib, half = self.slope()
        ends = [
            f"{name} {before:g} to {after:g}"
            for name in ("descriptors", "threads", "tasks")
            for before, after in (self.grown(lambda seen, name=name: getattr(seen, name)),)
        ]
        last = self.looks[-1]
        return (
            f"{last.seconds / 3600:.2f} h, {sum(self.done.values())} actions {dict(self.done)}, "
            f"wrong: {dict(self.wrong)}\nmemory {last.memory / MIB:.0f} MiB, {mib:+.2f} MiB an "
            f"hour (±{half:.2f}); {', '.join(ends)}"
        )


def _slope(looks: Sequence[Seen]) -> float:
    x = [seen.seconds / 3600 for seen in looks]
    return linear_regression(x, [seen.memory / MIB for seen in looks]).slope


def _mean(looks: Sequence[Seen]) -> tuple[float, float]:
    return fmean(s.seconds / 3600 for s in looks), fmean(s.memory / MIB for s in looks)


class Users:
    """Who does all that, a few at a time."""

    def __init__(self, served: Served, uploads: Sequence[tuple[bytes, bytes]], soak: Soak) -> None:
        self.address = ("127.0.0.1", served.port)
        self.uploads, self.soak = uploads, soak
        self.chance = Random(5)
        self.doing: tuple[tuple[Callable[[Client], Awaitable[str]], int], ...] = (
            (self.ask, 40),
            (self.leave, 20),
            (self.look, 10),
            (self.upload, 3),
            (self.break_off, 2),
            (self.delete, 3),
        )

    async def one(self, pause: float, warm: float, end: float) -> None:
        """Act until `end`, with pauses from `warm` on."""
        client = Client(self.address)
        kinds, weights = zip(*self.doing, strict=True)
        while time.monotonic() < end:
            (act,) = self.chance.choices(kinds, weights)
            try:
                self.soak.done[await act(client)] += 1
            except Lost as error:
                self.soak.wrong[str(error)] += 1
            rest = self.chance.expovariate(1 / pause)
            await asyncio.sleep(rest if time.monotonic() > warm else 0)
        await client.close()

    async def ask(self, client: Client) -> str:
        prompt = "word " * self.chance.randrange(1, 60)
        which = self.chance.choice((None, *NAMES))
        return await self._send(client, "request", generate(prompt, 12, which))

    async def look(self, client: Client) -> str:
        path = self.chance.choice(("/metrics", "/adapters", "/v1/models", "/health"))
        return await self._send(client, "look", request(path))

    async def upload(self, client: Client) -> str:
        return await self._send(client, "upload", self._form())

    async def delete(self, client: Client) -> str:
        path = f"/adapters/{self.chance.choice(NAMES)}"
        return await self._send(client, "deletion", request(path, method="DELETE"))

    async def leave(self, client: Client) -> str:
        """A stream that is not read to its end."""
        del client
        body = {"inputs": "a story", "parameters": {"max_new_tokens": 200, "ignore_eos": True}}
        await self._drop(request("/generate_stream", body), self.chance.random() * 0.3)
        return "left stream"

    async def break_off(self, client: Client) -> str:
        del client
        content = self._form()
        await self._drop(content[: self.chance.randrange(len(content))], 0.05)
        return "broken upload"

    async def _drop(self, content: bytes, after: float) -> None:
        try:
            reader, writer = await asyncio.open_connection(*self.address)
        except OSError as error:
            raise Lost(str(error)) from error
        writer.write(content)
        await asyncio.sleep(after)
        reader.feed_eof()
        writer.close()

    async def _send(self, client: Client, what: str, content: bytes) -> str:
        answer = await client.ask(content)
        if answer.status not in FINE:
            self.soak.wrong[f"{what}: {answer.status} {answer.body[:200]!r}"] += 1
        return f"{what} {answer.status}"

    def _form(self) -> bytes:
        config, weights = self.chance.choice(self.uploads)
        boundary = b"soak-boundary"
        parts = {"name": self.chance.choice(NAMES).encode(), "config": config, "weights": weights}
        body = b"".join(
            b'--%b\r\ncontent-disposition: form-data; name="%b"\r\n\r\n%b\r\n'
            % (boundary, name.encode(), content)
            for name, content in parts.items()
        )
        body += b"--%b--\r\n" % boundary
        head = b"POST /adapters HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: %d\r\n" % len(body)
        return head + b"content-type: multipart/form-data; boundary=%b\r\n\r\n" % boundary + body


async def soaked(
    served: Served,
    uploads: Sequence[tuple[bytes, bytes]],
    seconds: float,
    *,
    users: int = 4,
    pause: float = 0.5,
    every: float = LOOK_SECONDS,
    tell: Callable[[Soak], None] = lambda soak: None,
) -> Soak:
    soak = Soak()
    crowd, start = Users(served, uploads, soak), time.monotonic()
    warm, end = start + WARM * seconds, start + seconds
    going = [asyncio.ensure_future(crowd.one(pause, warm, end)) for _ in range(users)]
    while time.monotonic() < end:
        await asyncio.sleep(every)
        soak.looks.append(served.look())
        tell(soak)
    await asyncio.gather(*going)
    return soak


def judge(soak: Soak) -> list[str]:
    """What has grown, and what went wrong."""
    mib, half = soak.slope()
    found = [f"memory grows by {mib:.2f} MiB an hour (±{half:.2f})"] if mib - half > 1 else []
    for name, slack in (("descriptors", 3), ("threads", 3), ("tasks", 3)):
        before, after = soak.grown(lambda seen, name=name: getattr(seen, name))
        if after > before + slack:
            found.append(f"{name}: {before:g} to {after:g}")
    return found + [f"{what} ({many} times)" for what, many in soak.wrong.items()]


def material(work: Path) -> tuple[Path, list[tuple[bytes, bytes]]]:
    """A tiny base, and adapters of a few kinds as they are uploaded."""
    from tests.oracle import make_adapter, make_base

    base = make_base(work / "base", "llama")
    found = []
    for seed, kind in enumerate(("lora", "dora", "ia3", "lora", "vera", "prefix_tuning")):
        saved = make_adapter(work / f"{kind}-{seed}", base, kind, seed=seed)
        weights = (saved / "adapter_model.safetensors").read_bytes()
        found.append(((saved / "adapter_config.json").read_bytes(), weights))
    return base, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two actions")
    parser.add_argument("--looks", type=Path, help="where to write what was seen, as JSON lines")
    asked = parser.parse_args()

    def tell(soak: Soak) -> None:
        if asked.looks is not None:
            seen = soak.looks[-1]
            line = {name: getattr(seen, name) for name in Seen.__dataclass_fields__}
            with asked.looks.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if len(soak.looks) % 60 == 0:
            print(soak, flush=True)

    with tempfile.TemporaryDirectory() as directory:
        base, uploads = material(Path(directory))
        with serving(Path(directory) / "run", "--base", str(base), *FLAGS) as served:
            made = soaked(
                served,
                uploads,
                3600 * asked.hours,
                users=asked.users,
                pause=asked.pause,
                tell=tell,
            )
            soak = asyncio.run(made)
            status = served.stop()
    print(soak)
    wrong = judge(soak) + ([f"exit status {status}"] if status else [])
    print("\n".join(wrong) or "nothing grew")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
