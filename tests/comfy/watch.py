"""Run by ComfyUI's Python: queues a workflow as the page does, and writes as JSON what the server sends meanwhile.

python watch.py URL WORKFLOW.json
"""

from __future__ import annotations

import asyncio
import io
import json
import struct
import sys
from typing import Any

import aiohttp
from PIL import Image

IMAGE = (1, 4)  # kinds of binary messages


async def watch(url: str, workflow: dict[str, Any]) -> dict[str, Any]:
    seen: dict[str, Any] = {"texts": [], "pictures": [], "end": None}
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}/ws?clientId=watch") as socket:
        await session.post(f"{url}/prompt", json={"prompt": workflow, "client_id": "watch"})
        while seen["end"] is None:
            message = await socket.receive(timeout=120)
            if message.type == aiohttp.WSMsgType.BINARY:
                note(seen, message.data)
            elif message.type == aiohttp.WSMsgType.TEXT:
                told = json.loads(message.data)
                if told["type"] == "sdxl_lora.status" and told["data"]["phase"]:
                    seen["texts"].append("{phase}: {done} of {total}\n{detail}".format(**told["data"]))
                if told["type"] in ("execution_success", "execution_error"):
                    seen["end"] = told["type"]
    return seen


def note(seen: dict[str, Any], data: bytes) -> None:
    (kind,) = struct.unpack(">I", data[:4])
    if kind in IMAGE:
        picture = Image.open(io.BytesIO(data[data.index(b"\xff\xd8") :]))
        spread = max(high - low for low, high in picture.convert("RGB").getextrema())
        seen["pictures"].append([*picture.size, spread])


if __name__ == "__main__":
    with open(sys.argv[2], encoding="utf-8") as file:
        seen = asyncio.run(watch(sys.argv[1], json.load(file)))
    sys.stdout.write(json.dumps(seen))
