"""A hard stop on requests and tokens: what could exceed it is not sent."""

import asyncio

from wsae.evals.autointerp.llm.types import Request

TOKENS_PER_BYTE = 1 / 3
"""Prompt tokens per byte of UTF-8 where nobody counted: English has 1/4, Chinese 1/3, so this errs to the safe side."""
TOKENS_PER_MESSAGE = 8
"""What chat templates add around a turn."""


def estimated_tokens(request: Request) -> int:
    """Return about how many tokens a prompt has: a third of its bytes and 8 per turn."""
    size = sum(len(message.content.encode()) for message in request.messages)
    return round(size * TOKENS_PER_BYTE) + TOKENS_PER_MESSAGE * len(request.messages)


class Budget:
    """What a run has spent. A request is sent only if all that is spent and under way still fits with it.

    While requests are under way their estimates are held back; a request that does not fit waits for them to settle
    (real answers are shorter than their limits). If it still does not fit, the budget closes for good: which requests
    were left out does not depend on their size.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.requests = self.tokens = 0
        self.closed = False
        self._held = self._under_way = 0
        self._settled: asyncio.Condition | None = None

    def begin(self) -> None:
        """Start counting in a new event loop; nothing is under way."""
        self._held = self._under_way = 0
        self._settled = asyncio.Condition()

    def take(self, tokens: int) -> bool:
        """Reserve a request of so many tokens if it fits; `settle` must follow."""
        if self.closed or not self._fits(tokens):
            return False
        self.requests += 1
        self._under_way += 1
        self._held += tokens
        return True

    def settle(self, reserved: int, spent: int) -> None:
        """Replace a reservation by what was spent."""
        self._under_way -= 1
        self._held -= reserved
        self.tokens += spent

    async def reserve(self, tokens: int) -> bool:
        """Wait until a request fits or cannot fit any more; return whether it was reserved."""
        assert self._settled is not None, "begin() comes first"
        async with self._settled:
            while not self.take(tokens):
                if self.closed or not self._under_way or self.requests >= self.max_requests:
                    self.closed = True
                    return False
                await self._settled.wait()
            return True

    async def release(self, reserved: int, spent: int) -> None:
        """Settle, and wake those who wait."""
        assert self._settled is not None, "begin() comes first"
        async with self._settled:
            self.settle(reserved, spent)
            self._settled.notify_all()

    def _fits(self, tokens: int) -> bool:
        room = self.max_tokens - self.tokens - self._held
        return self.requests < self.max_requests and tokens <= room
