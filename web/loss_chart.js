// Draws the losses of a run on a canvas. Steps that share a column of pixels are one line from their least to their
// greatest value, so that ten thousand steps cost as much as a few hundred.

import { say } from "./words.js";

export const STEP = 0, LOSS = 1, SMOOTHED = 2, RATE = 3, VALIDATION = 4; // columns of a point

const COLORS = { raw: "#6ea8fe55", smoothed: "#6ea8fe", validation: "#ff7b72", rate: "#9aa0a6", mark: "#c297ff" };
const MARGIN = { left: 44, right: 8, top: 8, bottom: 18 };

/** `points` are rows of the columns above, by step; `checkpoints` are steps; `rates` draws the learning rate, too. */
export function drawLosses(canvas, { points, checkpoints, rates }) {
  const pen = fitted(canvas);
  const { clientWidth: width, clientHeight: height } = canvas;
  pen.clearRect(0, 0, width, height);
  if (!points.length) return;
  const area = { left: MARGIN.left, top: MARGIN.top, right: width - MARGIN.right, bottom: height - MARGIN.bottom };
  const steps = [points[0][STEP], Math.max(points.at(-1)[STEP], points[0][STEP] + 1)];
  const x = scale(steps, [area.left, area.right]);
  const range = lossRange(points);
  const y = scale(range, [area.bottom, area.top]);
  drawAxes(pen, area, steps, range);
  for (const step of checkpoints) drawMark(pen, x(step), area.bottom);
  if (rates) drawLine(pen, points, RATE, x, scale(valueRange(points, RATE, 0), [area.bottom, area.top]), COLORS.rate);
  drawLine(pen, points, LOSS, x, y, COLORS.raw);
  drawLine(pen, points, SMOOTHED, x, y, COLORS.smoothed, 1.6);
  drawDots(pen, points, VALIDATION, x, y, COLORS.validation);
}

/** The names and colors of what drawLosses draws of a run. */
export function legend({ points, checkpoints }, rates) {
  const validated = points.some((point) => Number.isFinite(point[VALIDATION]));
  return [
    [say("loss"), COLORS.raw],
    [say("smoothed"), COLORS.smoothed],
    ...(validated ? [[say("validation"), COLORS.validation]] : []),
    ...(rates ? [[say("learning rate"), COLORS.rate]] : []),
    ...(checkpoints.length ? [[say("checkpoint"), COLORS.mark]] : []),
  ];
}

function fitted(canvas) {
  const ratio = Math.max(1, window.devicePixelRatio || 1) * 2; // sharp when the graph is zoomed in
  const [width, height] = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)];
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  return pen;
}

const scale = ([low, high], [from, to]) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);

/** Of the averages and validation losses and of nearly all losses: single outliers would flatten the rest. */
function lossRange(points) {
  const losses = points.map((point) => point[LOSS]).filter(Number.isFinite).sort((a, b) => a - b);
  const others = points.flatMap((point) => [point[SMOOTHED], point[VALIDATION]]).filter(Number.isFinite);
  const values = [losses[Math.floor(losses.length * 0.01)], losses[Math.ceil(losses.length * 0.99) - 1]];
  return padded(values.filter(Number.isFinite), others);
}

function valueRange(points, column, low) {
  return padded([low], points.map((point) => point[column]).filter(Number.isFinite));
}

function padded(...lists) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of lists.flat()) [low, high] = [Math.min(low, value), Math.max(high, value)];
  if (low > high) return [0, 1];
  const room = (high - low || Math.abs(high) || 1) * 0.05;
  return [low - room, high + room];
}

function drawAxes(pen, area, [first, last], [low, high]) {
  pen.fillStyle = COLORS.rate;
  pen.strokeStyle = "#8885";
  pen.lineWidth = 1;
  pen.font = "10px sans-serif";
  pen.strokeRect(area.left, area.top, area.right - area.left, area.bottom - area.top);
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  for (const share of [0.1, 0.5, 0.9]) {
    const value = low + (high - low) * share;
    pen.fillText(value.toPrecision(3), area.left - 4, area.bottom + (area.top - area.bottom) * share);
  }
  pen.textBaseline = "top";
  pen.fillText(String(last), area.right, area.bottom + 5);
  pen.textAlign = "left";
  pen.fillText(String(first), area.left, area.bottom + 5);
}

function drawMark(pen, x, bottom) {
  pen.fillStyle = COLORS.mark;
  pen.beginPath();
  pen.moveTo(x, bottom - 6);
  pen.lineTo(x - 3, bottom);
  pen.lineTo(x + 3, bottom);
  pen.fill();
}

function drawLine(pen, points, column, x, y, color, width = 1) {
  pen.strokeStyle = color;
  pen.lineWidth = width;
  pen.beginPath();
  let [at, low, high, last, begun] = [null, 0, 0, 0, false];
  const flush = () => {
    if (at === null) return;
    if (begun) pen.lineTo(at, y(low));
    else pen.moveTo(at, y(low));
    if (high !== low) pen.lineTo(at, y(high));
    if (last !== high) pen.lineTo(at, y(last));
    begun = true;
  };
  for (const point of points) {
    const value = point[column];
    if (!Number.isFinite(value)) continue;
    const here = Math.round(x(point[STEP]) * 2) / 2;
    if (here === at) [low, high, last] = [Math.min(low, value), Math.max(high, value), value];
    else {
      flush();
      [at, low, high, last] = [here, value, value, value];
    }
  }
  flush();
  pen.stroke();
}

function drawDots(pen, points, column, x, y, color) {
  const found = points.filter((point) => Number.isFinite(point[column]));
  drawLine(pen, found, column, x, y, color);
  pen.fillStyle = color;
  for (const point of found) pen.fillRect(x(point[STEP]) - 1.5, y(point[column]) - 1.5, 3, 3);
}
