"""The routes that show and change datasets, on a real server: what they do, and that hostile requests do nothing."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

import pytest
from PIL import Image

CAPTION, UPLOAD = "/sdxl_lora/dataset/caption", "/sdxl_lora/dataset/upload"
THUMBNAIL = "/sdxl_lora/dataset/thumbnail"
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=cut", "X-SDXL-LoRA": "1"}
EVIL = {"Origin": "http://evil.example"}
BUNDLED = "sample: 8-bit (bundled)"


def png(color: str = "red") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (400, 300), color).save(data, "PNG")
    return data.getvalue()


def form(*files: tuple[str, bytes]) -> bytes:
    parts = [
        f'--cut\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in files
    ]
    return b"".join([*parts, b"--cut--\r\n"])


def wanted(folder: Any = "routes", image: Any = "b.png", text: Any = "owned") -> bytes:
    return json.dumps({"folder": folder, "image": image, "text": text}).encode()


class Asked(NamedTuple):
    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = JSON


def ask(server: Any, asked: Asked) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    try:
        connection.putrequest(asked.method, asked.path)
        for name, value in {"Content-Length": str(len(asked.body)), **asked.headers}.items():
            if value:
                connection.putheader(name, value)
        connection.endheaders()
        connection.send(asked.body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def caption(server: Any, *values: Any) -> tuple[int, Any]:
    status, answer = ask(server, Asked("POST", CAPTION, wanted(*values)))
    return status, json.loads(answer)


def upload(server: Any, query: str, *files: tuple[str, bytes]) -> tuple[int, Any]:
    status, answer = ask(server, Asked("POST", f"{UPLOAD}?{query}", form(*files), FORM))
    return status, json.loads(answer)


@pytest.fixture(scope="module")
def folder(server: Any) -> Iterator[Path]:
    """A dataset in ComfyUI's input folder, with links that lead out of it."""
    found = server.base / "input/routes"
    found.mkdir()
    for name, color in (("a", "red"), ("b", "blue"), ("c", "green"), ("d", "grey"), ("e", "white")):
        (found / f"{name}.png").write_bytes(png(color))
    (found / "a.txt").write_text("a cat")
    outside = server.base / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (outside / "secret.png").write_bytes(png())
    (found / "c.txt").symlink_to(outside / "secret.txt")
    (found / "link.png").symlink_to(outside / "secret.png")
    (found / "d.txt").mkdir()
    (found / "metadata.csv").write_text("file_name,caption\ne.png,a swan\n")
    (server.base / "input/linked").symlink_to(outside)
    yield found


def test_captions_are_written_and_taken_back(server: Any, folder: Path) -> None:
    assert caption(server, "routes", "a.png", "a dog") == (200, {"caption_file": "a.txt", "previous": "a cat"})
    assert (folder / "a.txt").read_text() == "a dog"
    assert caption(server, "routes", "a.png", "a cat")[1]["previous"] == "a dog"
    assert caption(server, "routes", "b.png", "a b\u00e4r") == (200, {"caption_file": "b.txt", "previous": None})
    assert (folder / "b.txt").read_text("utf-8") == "a b\u00e4r"
    assert caption(server, "routes", "b.png", None)[0] == 200
    assert (folder / "a.txt").read_text() == "a cat" and not (folder / "b.txt").exists()


def test_a_folder_is_uploaded_and_chosen(server: Any, folder: Path) -> None:
    status, answer = upload(server, "folder=routes", ("x.png", png()), ("bad.png", b"bad"), ("x.txt", b"a fox"))
    assert (status, answer["folder"], answer["stored"]) == (200, "routes_00002", ["x.png", "x.txt"])
    (refused,) = answer["refused"]
    assert refused["file"] == "bad.png" and "cannot be used: it is not an image" in refused["reason"]
    _, more = upload(server, "into=routes_00002", ("x.png", png("blue")), ("10_cat/y.png", png()))
    assert more == {"folder": "routes_00002", "stored": ["x_00002.png", "10_cat/y.png"], "refused": []}
    made = server.base / "input/routes_00002"
    assert (made / "x.png").read_bytes() == png() and (made / "x.txt").read_text() == "a fox"
    assert {"routes", "routes_00002", BUNDLED} <= set(server.get("/sdxl_lora/datasets"))
    assert not list((server.base / "input").glob(".*.tmp"))


def test_thumbnails(server: Any, folder: Path) -> None:
    bundled = next((Path(__file__).resolve().parents[2] / "assets/sample-dataset/images").glob("*.png")).name
    for name, image in (("routes", "b.png"), (BUNDLED, f"images/{bundled}")):
        query = urlencode({"folder": name, "image": image})
        status, data = ask(server, Asked("GET", f"{THUMBNAIL}?{query}"))
        with Image.open(io.BytesIO(data)) as found:
            assert (status, found.format) == (200, "JPEG") and max(found.size) <= 256


FOLDERS = {
    "parent": "..",
    "above": "../..",
    "inside and out": "routes/../../outside",
    "root": "/",
    "system": "/etc",
    "dot": ".",
    "empty": "",
    "drive": "C:\\Windows",
    "share": "\\\\host\\share",
    "backslashes": "..\\outside",
    "null": "routes\0",
    "long": "a" * 5000,
    "device": "CON",
    "stream": "routes:hidden",
    "surrogate": "\ud800",
    "url": "file:///etc",
    "encoded": "%2e%2e",
    "a file": "routes/a.png",
    "missing": "nowhere",
    "linked": "linked",
    "bundled": BUNDLED,
}
IMAGES = {
    "parent": "../outside/secret.png",
    "absolute": "/etc/passwd",
    "null": "b.png\0",
    "long": "a" * 5000 + ".png",
    "device": "nul.png",
    "a text": "a.txt",
    "a link out": "link.png",
    "its text is a link out": "c.png",
    "its text is a folder": "d.png",
    "its caption is metadata": "e.png",
    "missing": "z.png",
    "empty": "",
}
NAMES = {
    "parent": "../x.png",
    "absolute": "/etc/x.png",
    "drive": "C:/x.png",
    "null": "a\0.png",
    "line": "a\r\nX: y.png",
    "hidden": ".x.png",
    "script": "x.py",
    "page": "x.html",
    "no suffix": "x",
    "two suffixes": "x.png.exe",
    "device": "con.png",
    "long": "a" * 300 + ".png",
    "deep": "a/" * 200 + "../x.png",
    "empty": "",
}
BODIES: dict[str, bytes] = {
    "no JSON": b"{",
    "not UTF-8": b"\xff\xfe{}",
    "a list": b"[]",
    "nested": b"[" * 100_000,
    "nothing": b"",
    "missing text": b'{"folder": "routes", "image": "b.png"}',
    "more": b'{"folder": "routes", "image": "b.png", "text": "x", "path": "/etc"}',
    "number": wanted(text=5),
    "list": wanted(text=["x"]),
    "object": wanted(image={"a": 1}),
    "folder null": wanted(folder=None),
    "blank": wanted(text=" \n"),
    "null character": wanted(text="a\0b"),
    "surrogate": wanted(text="\ud800"),
    "long caption": wanted(text="a" * 70_000),
    "huge": wanted(text="a" * 600_000),
    "removal of a caption not created": wanted(image="a.png", text=None),
    "removal of nothing": wanted(text=None),
}
GOOD = form(("x.png", png()))
HOSTILE: dict[str, Asked] = {
    **{f"caption folder {name}": Asked("POST", CAPTION, wanted(folder=value)) for name, value in FOLDERS.items()},
    **{f"caption image {name}": Asked("POST", CAPTION, wanted(image=value)) for name, value in IMAGES.items()},
    **{f"caption {name}": Asked("POST", CAPTION, body) for name, body in BODIES.items()},
    **{
        f"upload to {name}": Asked("POST", f"{UPLOAD}?{urlencode({'into': value}, errors='replace')}", GOOD, FORM)
        for name, value in {**FOLDERS, "folder of the user": "routes", "input": "input"}.items()
    },
    **{
        f"upload as {name}": Asked("POST", f"{UPLOAD}?{urlencode({'folder': value}, errors='replace')}", GOOD, FORM)
        for name, value in FOLDERS.items()
        if name not in ("missing", "linked", "encoded", "surrogate")  # these are names of new folders
    },
    **{
        f"upload of {name}": Asked("POST", f"{UPLOAD}?folder=new", form((value, png())), FORM)
        for name, value in NAMES.items()
    },
    "upload of no image": Asked("POST", f"{UPLOAD}?folder=new", form(("x.png", b"MZ\x90")), FORM),
    "upload of a page as image": Asked("POST", f"{UPLOAD}?folder=new", form(("x.jpg", b"<html></html>")), FORM),
    "upload of half an image": Asked("POST", f"{UPLOAD}?folder=new", form(("x.png", png()[:200])), FORM),
    "upload of bytes as text": Asked("POST", f"{UPLOAD}?folder=new", form(("x.txt", b"\0\1")), FORM),
    "upload of a long text": Asked("POST", f"{UPLOAD}?folder=new", form(("x.txt", b"a" * 70_000)), FORM),
    "upload of too many": Asked("POST", f"{UPLOAD}?folder=new", form(*[("x.py", b"")] * 70), FORM),
    "upload of nothing": Asked("POST", f"{UPLOAD}?folder=new", form(), FORM),
    "upload of no form": Asked("POST", f"{UPLOAD}?folder=new", b"x", FORM),
    "upload cut off": Asked("POST", f"{UPLOAD}?folder=new", GOOD[:-40], FORM),
    "upload nowhere": Asked("POST", UPLOAD, GOOD, FORM),
    "upload to two": Asked("POST", f"{UPLOAD}?folder=a&into=b", GOOD, FORM),
    "upload as JSON": Asked("POST", f"{UPLOAD}?folder=new", b"{}", {**FORM, **JSON}),
    "upload by a form of another site": Asked(
        "POST", f"{UPLOAD}?folder=new", GOOD, {"Content-Type": FORM["Content-Type"]}
    ),
    "upload announced as huge": Asked("POST", f"{UPLOAD}?folder=new", b"", {**FORM, "Content-Length": str(10**12)}),
    "caption by a form of another site": Asked("POST", CAPTION, wanted(), {"Content-Type": "text/plain"}),
    "caption as form": Asked("POST", CAPTION, wanted(), {"Content-Type": "application/x-www-form-urlencoded"}),
    "caption without type": Asked("POST", CAPTION, wanted(), {}),
    "caption announced as huge": Asked("POST", CAPTION, b"", {**JSON, "Content-Length": str(10**12)}),
    "caption of no length": Asked(
        "POST", CAPTION, b"0\r\n\r\n", {**JSON, "Content-Length": "", "Transfer-Encoding": "chunked"}
    ),
    **{
        f"thumbnail of {name}": Asked("GET", f"{THUMBNAIL}?folder={quote(value, errors='replace')}&image=a.png")
        for name, value in FOLDERS.items()
        if name not in ("linked", "bundled", "long")
    },
    **{
        f"thumbnail {name}": Asked("GET", f"{THUMBNAIL}?folder=routes&image={quote(value)}")
        for name, value in IMAGES.items()
        if value not in ("c.png", "d.png", "e.png")
    },
    "thumbnail without names": Asked("GET", THUMBNAIL),
}
UNROUTED: dict[str, Asked] = {  # what ComfyUI's server answers itself
    "caption from another site": Asked("POST", CAPTION, wanted(), {**JSON, **EVIL}),
    "upload from another site": Asked("POST", f"{UPLOAD}?folder=new", GOOD, {**FORM, **EVIL}),
    "caption by GET": Asked("GET", CAPTION),
    "caption by PUT": Asked("PUT", CAPTION, wanted()),
    "caption by DELETE": Asked("DELETE", CAPTION),
    "upload by PUT": Asked("PUT", f"{UPLOAD}?folder=new", GOOD, FORM),
    "a path in place of a name": Asked("GET", f"{THUMBNAIL}/../../routes/a.png"),
    "long address": Asked("GET", f"{THUMBNAIL}?folder={'a' * 9000}"),
}


def state(base: Path) -> dict[str, str]:
    """What each file and link in ComfyUI's folders is. Only its log and its database may change."""
    found = {}
    for parent, folders, names in os.walk(base):
        folders[:] = [name for name in folders if name not in ("user", "__pycache__")]
        for path in (Path(parent, name) for name in (*folders, *names) if name != "server.log"):
            is_file = path.is_file() and not path.is_symlink()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else ""
            found[str(path)] = str(path.readlink()) if path.is_symlink() else content
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests_change_nothing_and_get_a_sentence(server: Any, folder: Path, name: str) -> None:
    before = state(server.base)
    status, answer = ask(server, HOSTILE[name])
    assert state(server.base) == before
    assert 400 <= status < 500, answer
    sentence = json.loads(answer)["error"]
    assert 20 < len(sentence) < 700 and " " in sentence and "Traceback" not in sentence


@pytest.mark.parametrize("name", UNROUTED)
def test_requests_of_other_kinds_change_nothing(server: Any, folder: Path, name: str) -> None:
    before = state(server.base)
    status, _ = ask(server, UNROUTED[name])
    assert state(server.base) == before
    assert 400 <= status < 500
