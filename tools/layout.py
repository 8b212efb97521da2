"""Places the nodes of a template: numbered groups from left to right, columns in them, links around other nodes.

Positions are those of ComfyUI's page: pixels, y down, a node's position below its title.
"""

from __future__ import annotations

from typing import Any

from tools.templates import Note, Step

TITLE, GAP, BETWEEN = 30, 24, 36  # pixels: a node's title, between nodes of a column, between columns
LANE, MARGIN, HEADING = 10, 14, 40  # between links that run side by side, around the nodes of a group, its title
PAGE, CORNER = (1520, 850), (70, 66)  # pixels of the screen that are free of the page's bars, and where they begin
COLORS = ("#3f789e", "#6a5a9e", "#3f8a5f", "#a1713f", "#8a4a5f")

Node = dict[str, Any]
Link = list[Any]  # id, source node, its output, target node, its input, type


def place(steps: tuple[Step, ...], nodes: list[Node]) -> list[list[Node]]:
    """Sets positions and widths, adds the notes to `nodes`, and returns the nodes of each column from left to right."""
    by_id = {node["id"]: node for node in nodes}
    columns: list[list[Node]] = []
    left = 0
    for column in (column for step in steps for column in step.columns):
        placed, top = [], 0
        for item in column.items:
            node = _note(max(node["id"] for node in nodes) + 1, item) if isinstance(item, Note) else by_id[int(item)]
            if isinstance(item, Note):
                nodes.append(node)
            node["pos"] = [left, top + TITLE]
            node["size"][0] = column.width
            placed.append(node)
            top += TITLE + node["size"][1] + GAP
        columns.append(placed)
        left += column.width + BETWEEN
    return columns


def groups(steps: tuple[Step, ...], columns: list[list[Node]], above: int, below: int) -> list[dict[str, Any]]:
    """A frame around the columns of each step, with room for `above` and `below` links that pass over the nodes."""
    bottom = max(node["pos"][1] + node["size"][1] for column in columns for node in column)
    top, height = -LANE * above - HEADING, bottom + LANE * (above + below) + HEADING + MARGIN
    found, first = [], 0
    for number, step in enumerate(steps, 1):
        last = columns[first + len(step.columns) - 1][0]
        left = columns[first][0]["pos"][0] - MARGIN
        width = last["pos"][0] + last["size"][0] + MARGIN - left
        found.append(
            {
                "id": number,
                "title": f"{number} {step.title}",
                "bounding": [left, top, width, height],
                "color": COLORS[number - 1],
                "font_size": 22,
                "flags": {},
            }
        )
        first += len(step.columns)
    return found


def view(frames: list[dict[str, Any]]) -> dict[str, Any]:
    """The zoom and offset that show all groups on a page of 1680 x 1000 pixels; newer pages fit it themselves."""
    left, top, _, height = frames[0]["bounding"]
    last_left, _, last_width, _ = frames[-1]["bounding"]
    scale = round(min(PAGE[0] / (last_left + last_width - left), PAGE[1] / height, 1), 3)
    return {"scale": scale, "offset": [round(CORNER[0] / scale - left), round(CORNER[1] / scale - top)]}


class Routes:
    """Leads the links that skip a column over or below the nodes between, by reroute points.

    They pass above the nodes, but below if a link from the first step comes down between: the two would cross.
    """

    def __init__(self, columns: list[list[Node]], links: list[Link], first_step: int) -> None:
        self.points: list[dict[str, Any]] = []
        self.ends: list[dict[str, int]] = []  # of each led link its last point
        self._columns = columns
        self._column = {node["id"]: number for number, column in enumerate(columns) for node in column}
        self._bottom = max(node["pos"][1] + node["size"][1] for column in columns for node in column)
        skipping = [link for link in links if self._column[link[3]] > self._column[link[1]] + 1]
        slots = sorted({(self._column[link[1]], link[1], link[2]) for link in skipping})
        landings = {self._column[link[3]] for link in skipping if self._column[link[1]] < first_step}
        self.above = [slot for slot in slots if slot[0] < first_step or not landings & self._passed(slot, skipping)]
        self.below = [slot for slot in slots if slot not in self.above]
        for lane, slot in enumerate(self.above):
            self._lead(slot, skipping, lane, -LANE * (len(self.above) - lane))
        for lane, slot in enumerate(self.below):
            self._lead(slot, skipping, lane, self._bottom + LANE * (len(self.below) - lane))

    def _passed(self, slot: tuple[int, int, int], skipping: list[Link]) -> set[int]:
        ends = [self._column[link[3]] for link in skipping if tuple(link[1:3]) == slot[1:]]
        return set(range(slot[0] + 1, max(ends)))

    def _lead(self, slot: tuple[int, int, int], skipping: list[Link], lane: int, y: int) -> None:
        number, source, output = slot
        links = sorted(
            (link for link in skipping if (link[1], link[2]) == (source, output)),
            key=lambda link: self._column[link[3]],
        )
        edge = self._columns[number][0]
        start = self._point(edge["pos"][0] + edge["size"][0] + LANE * (lane + 1), y, None, links)
        for index, link in enumerate(links):
            left = self._columns[self._column[link[3]]][0]["pos"][0]
            start = self._point(left - LANE * (lane + 1), y, start, links[index:])
            self.ends.append({"id": link[0], "parentId": start})

    def _point(self, x: int, y: int, parent: int | None, links: list[Link]) -> int:
        point = {"id": len(self.points) + 1, "pos": [x, y], "linkIds": [link[0] for link in links]}
        self.points.append(point | ({} if parent is None else {"parentId": parent}))
        return point["id"]


def _note(node_id: int, note: Note) -> Node:
    return {
        "id": node_id,
        "type": "MarkdownNote",
        "title": note.title,
        "pos": [0, 0],
        "size": [0, note.height],
        "flags": {},
        "order": node_id,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [note.text],
        "color": "#2f3a44",
        "bgcolor": "#262f37",
    }
