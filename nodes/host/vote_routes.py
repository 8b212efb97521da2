"""Routes for voting: a page that shows pairs of images blind, and takes votes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...sdxl_lora_core.messages import shown
from .folders import output_folder
from .requests import Kinds, Refused, answering, json_body
from .server import json_answer, route_table

if TYPE_CHECKING:
    from aiohttp.web import FileResponse, Request, Response

    from ...sdxl_lora_core.evaluation.ballot import Ballot

MAX_VOTE_REQUEST = 4096  # bytes
PAGE = Path(__file__).parent.parent.parent / "sdxl_lora_core/evaluation/templates/vote.html"
LOCALES = Path(__file__).parent.parent.parent / "locales"
_WORDS = "/* by the server */ {}"
_VOTE: Kinds = {"rater": str, "number": int, "choice": str}
_SAME_SITE = (
    "default-src 'none'; img-src 'self'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
)
_HEADERS = {"Content-Security-Policy": _SAME_SITE, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


def votes_folder() -> Path:
    return output_folder() / "votes"


def add_vote_routes() -> None:
    """Adds the routes, for the votes in output/votes by their names:

    GET /sdxl_lora/vote/NAME is the page.
    GET /sdxl_lora/vote/NAME/pair?rater=RATER&number=N is the rater's pair N: prompt, names of both images, and how many
    pairs of how many are done. Without a number it is the first one without a vote, {"finished": true} if there is
    none.
    GET /sdxl_lora/vote/NAME/image/IMAGE is an image.
    POST /sdxl_lora/vote/NAME with {"rater", "number", "choice"} as JSON stores a vote; the choice is left, right or
    tie. The answer is the next pair.
    GET /sdxl_lora/vote/NAME/ranking is the ranking by the votes so far, see BallotReport.

    Errors are {"error": a sentence} with a status of 4xx, or 507 for a vote that could not be stored.
    """
    if (table := route_table()) is None:
        return
    routes = _VoteRoutes()
    table.get("/sdxl_lora/vote/{name}")(answering(routes.page))
    table.get("/sdxl_lora/vote/{name}/pair")(answering(routes.pair))
    table.get("/sdxl_lora/vote/{name}/image/{image}")(answering(routes.image))
    table.post("/sdxl_lora/vote/{name}")(answering(routes.vote))
    table.get("/sdxl_lora/vote/{name}/ranking")(answering(routes.ranking))


class _VoteRoutes:
    def __init__(self) -> None:
        self._workers = ThreadPoolExecutor(2, "votes")

    async def page(self, request: Request) -> Response:
        from aiohttp.web import Response

        await self._ballot(request)
        language = request.headers.get("Accept-Language", "")[:2]
        page = PAGE.read_text(encoding="utf-8").replace(_WORDS, json.dumps(_words(language)).replace("<", "\\u003c"))
        return Response(body=page.encode(), content_type="text/html", headers=_HEADERS)

    async def pair(self, request: Request) -> Response:
        from ...sdxl_lora_core.evaluation.ballot import require_rater

        ballot = await self._ballot(request)
        rater, number = require_rater(request.query.get("rater")), request.query.get("number")
        if number is not None and not (number.isdecimal() and len(number) < 10):
            raise Refused(400, f"number is {shown(number)}: give that of a pair")
        return json_answer(await self._in(_pair, ballot, rater, None if number is None else int(number)))

    async def image(self, request: Request) -> FileResponse:
        from aiohttp.web import FileResponse

        ballot = await self._ballot(request)
        return FileResponse(ballot.image(request.match_info["image"]))

    async def vote(self, request: Request) -> Response:
        wanted = await json_body(request, _VOTE, MAX_VOTE_REQUEST)
        return json_answer(await self._in(_store, await self._ballot(request), wanted))

    async def ranking(self, request: Request) -> Response:
        ballot = await self._ballot(request)
        return json_answer(await self._in(_ranking, ballot))

    async def _ballot(self, request: Request) -> Ballot:
        from ...sdxl_lora_core.evaluation.ballot import read_ballot

        return await self._in(read_ballot, votes_folder(), request.match_info["name"])

    async def _in(self, work: Callable[..., Any], *values: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._workers, work, *values)


def _words(language: str) -> dict[str, str]:
    """The translations of what the page says; none for a language that the pack does not have."""
    file = LOCALES / language / "main.json"
    known = language.isalpha() and file.is_file()
    return json.loads(file.read_text(encoding="utf-8"))["sdxlLoRA"] if known else {}


def _pair(ballot: Ballot, rater: str, number: int | None = None) -> dict[str, Any]:
    from ...sdxl_lora_core.evaluation.ballot import read_votes, unvoted

    pairs, left = ballot.pairs_for(rater), unvoted(ballot, rater, read_votes(ballot))
    counts = {"done": len(pairs) - len(left), "total": len(pairs)}
    if number is None and not left:
        return {"finished": True, **counts}
    number = left[0] if number is None else number
    if number >= len(pairs):
        raise Refused(404, f"there is no pair {number}: the vote has {len(pairs)}")
    following = next((other for other in left if other != number), None)
    return {
        "finished": False,
        "number": number,
        "prompt": ballot.prompt_of(pairs[number]),
        "images": ballot.image_names(pairs[number]),
        "next_images": [] if following is None else ballot.image_names(pairs[following]),
        **counts,
    }


def _store(ballot: Ballot, wanted: dict[str, Any]) -> dict[str, Any]:
    from ...sdxl_lora_core.evaluation.ballot import append_vote, require_choice, require_rater

    rater, choice, pairs = require_rater(wanted["rater"]), require_choice(wanted["choice"]), ballot.pairs
    if not 0 <= wanted["number"] < len(pairs):
        raise Refused(404, f"there is no pair {wanted['number']}: the vote has {len(pairs)}")
    try:
        append_vote(ballot, ballot.vote(rater, ballot.pairs_for(rater)[wanted["number"]], choice))
    except OSError as error:
        raise Refused(507, f"the vote could not be stored: {error.strerror or error}") from error
    return _pair(ballot, rater)


def _ranking(ballot: Ballot) -> dict[str, Any]:
    from ...sdxl_lora_core.evaluation.ballot import read_votes
    from ...sdxl_lora_core.evaluation.ballot_report import BallotReport

    return BallotReport(ballot, read_votes(ballot)).as_json()
