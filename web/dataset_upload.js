// Requests to the dataset's routes, and files that are dropped or chosen for an upload.
import { say } from "./words.js";
import { api } from "../../scripts/api.js";

// Limits of the route for one request.
const MOST_FILES = 32;
const MOST_BYTES = 128 * 2 ** 20;

/** An answer's JSON. Throws the sentence of an answer that is an error. */
export async function ask(path, options) {
  const response = await api.fetchApi(path, options);
  const answer = await response.json().catch(() => ({ error: say("The server answers {status}.", { status: response.status }) }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

export function hasFiles(event) {
  return Array.from(event.dataTransfer?.types ?? []).includes("Files");
}

/** The name of a new folder, and files with their paths in it: {name, files: [{path, file}]}. */
export function fromInput(input) {
  const files = [...input.files].map((file) => ({ path: file.name, file }));
  input.value = ""; // so that the same files can be chosen again
  return { name: dated(), files };
}

/** As fromInput, of dropped files and folders. A single folder gives its name. */
export function fromDrop(transfer) {
  // These must be asked for before the event is over.
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const plain = [...transfer.files];
  return entries.length ? fromEntries(entries) : { name: dated(), files: plain.map((file) => ({ path: file.name, file })) };
}

async function fromEntries(entries) {
  const [only] = entries;
  if (entries.length === 1 && only.isDirectory) return { name: only.name, files: await filesIn(only, "") };
  const found = await Promise.all(entries.map((entry) => filesOf(entry, entry.name)));
  return { name: dated(), files: found.flat() };
}

async function filesOf(entry, path) {
  if (entry.name.startsWith(".")) return []; // hidden files are no part of a dataset
  if (entry.isDirectory) return filesIn(entry, `${path}/`);
  return [{ path, file: await new Promise((resolve, reject) => entry.file(resolve, reject)) }];
}

async function filesIn(directory, prefix) {
  const reader = directory.createReader();
  const entries = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // 100 at most
    if (!some.length) break;
    entries.push(...some);
  }
  const found = await Promise.all(entries.map((entry) => filesOf(entry, prefix + entry.name)));
  return found.flat();
}

function dated() {
  const now = new Date();
  const two = (number) => String(number).padStart(2, "0");
  return `dataset-${now.getFullYear()}-${two(now.getMonth() + 1)}-${two(now.getDate())}`;
}

/**
 * Uploads files into the new folder `name`. Calls `progress` with the number of files that are done.
 * Returns {folder, stored: a number, refused: [{file, reason}]}; throws if none can be used.
 */
export async function upload(name, files, progress) {
  if (!files.length) throw new Error(say("nothing to upload: drop images, or a folder with images and their .txt files"));
  const done = { folder: "", stored: 0, refused: [] };
  let sent = 0;
  for (const some of requests(files)) {
    progress(sent);
    const where = done.folder ? { into: done.folder } : { folder: name };
    const body = new FormData();
    for (const { path, file } of some) body.append("file", file, path);
    const options = { method: "POST", headers: { "X-SDXL-LoRA": "1" }, body };
    try {
      const answer = await ask(`/sdxl_lora/dataset/upload?${new URLSearchParams(where)}`, options);
      done.folder = answer.folder;
      done.stored += answer.stored.length;
      done.refused.push(...answer.refused);
    } catch (error) {
      done.refused.push({ file: some[0].path, reason: error.message });
    }
    sent += some.length;
  }
  if (!done.folder) throw new Error(done.refused.map(({ file, reason }) => `${file}: ${reason}`).join("\n"));
  return done;
}

/** The files in groups that are sent at once. */
function requests(files) {
  const groups = [[]];
  let bytes = 0;
  for (const one of files) {
    bytes += one.file.size;
    if (groups.at(-1).length === MOST_FILES || (bytes > MOST_BYTES && groups.at(-1).length)) {
      groups.push([]);
      bytes = one.file.size;
    }
    groups.at(-1).push(one);
  }
  return groups;
}
