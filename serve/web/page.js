// The page is a client of /v1/videos and nothing else: what it shows comes from the server, so a reload loses nothing.

import * as materials from "./materials.js";

const $ = (id) => document.getElementById(id);
const form = $("slate");
const takes = new Map(); // id -> {video, node, url, watching}
const PAGE = 24;
const COMMON = [[1280, 720], [832, 480], [624, 624], [480, 832], [720, 1280]];
const PHASES = { starting: "starting", text: "reading the prompt", denoise: "denoising", decode: "decoding", encode: "writing the file" };

let key = sessionStorage.getItem("key") || localStorage.getItem("key") || "";
let model = null;
let oldest = null;

// --- the server ---

class Refusal extends Error {
  constructor(status, { message, code, param }) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

async function call(path, { method = "GET", json, form: parts, signal } = {}) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  if (json) headers["content-type"] = "application/json";
  const answer = await fetch(path, { method, headers, body: parts ?? (json && JSON.stringify(json)), signal });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  const refusal = new Refusal(answer.status, told.error ?? { message: `The server answered ${answer.status}.` });
  if (answer.status === 401) askForKey();
  throw refusal;
}

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

// --- the model ---

async function meet() {
  for (;;) {
    try {
      const served = await look();
      if (served.every((one) => one.limits_and_defaults)) return materials.list(served, prepare);
    } catch (error) {
      $("model").textContent = error instanceof Refusal ? error.message : "The server does not answer. Trying again…";
      if (error.status === 401) return;
    }
    await sleep(1000);
  }
}

async function look() {
  const served = (await (await call("/v1/models")).json()).data;
  describe(served.find(({ phase }) => phase !== "unloaded") ?? served[0]);
  return served;
}

function describe({ id, phase, runtime }) {
  const name = document.createElement("b");
  name.textContent = id;
  const layers = runtime?.quantised_layers?.[0];
  const facts = [phase, runtime?.device, layers ? `${layers.format} × ${layers.compute}` : runtime?.dtype];
  $("model").replaceChildren(name, ` ${facts.filter(Boolean).join(" · ")}`);
}

function prepare(found, fresh) {
  model = found.limits_and_defaults;
  const draft = JSON.parse(sessionStorage.getItem("draft") || "{}");
  for (const name of ["width", "height"]) Object.assign(form[name], { min: model.size_multiple, step: model.size_multiple });
  form.num_frames.max = model.max_frames;
  const fields = ["width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale"];
  const same = !fresh && (!draft.model || draft.model === found.id); // another model has other defaults
  for (const name of fields) form[name].value = (same && draft[name]) || model[name];
  for (const name of ["prompt", "negative_prompt", "seed"]) form[name].value ||= draft[name] || "";
  materials.offer(model, found.loras);
  drawShapes();
  tellLength();
  $("roll").disabled = false;
}

// --- the slate ---

function drawShapes() {
  const fits = ([w, h]) => w % model.size_multiple === 0 && h % model.size_multiple === 0 && w * h <= model.max_pixels;
  const { width: w, height: h, size_multiple: unit } = model;
  const near = (pixels) => Math.floor(pixels / unit) * unit;
  const side = Math.sqrt(w * h);
  const made = [[w, h], [h, w], ...COMMON, [near(side * 1.31), near(side / 1.31)], [near(side), near(side)], [near(side / 1.31), near(side * 1.31)]];
  const shapes = new Map(made.filter(fits).map(([a, b]) => [`${a}×${b}`, [a, b]]));
  const widest = [...shapes.values()].sort(([a, b], [c, d]) => c / d - a / b || c - a).slice(0, 6);
  $("shapes").replaceChildren(...widest.map(shapeButton));
  tickShape();
}

function shapeButton([w, h]) {
  const label = document.createElement("label");
  const radio = Object.assign(document.createElement("input"), { type: "radio", name: "shape", value: `${w}x${h}` });
  radio.setAttribute("aria-label", `${w} by ${h}`);
  label.title = `${w} × ${h}`;
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 54 48");
  const scale = 32 / Math.max(w, h);
  const box = document.createElementNS(space, "rect");
  const place = { x: 27 - (w * scale) / 2, y: 24 - (h * scale) / 2, width: w * scale, height: h * scale, rx: 1.5, "stroke-width": 1.5 };
  for (const [name, value] of Object.entries(place)) box.setAttribute(name, value);
  svg.append(box);
  label.append(radio, svg);
  return label;
}

function tickShape() {
  for (const radio of form.querySelectorAll("[name=shape]")) radio.checked = radio.value === `${form.width.value}x${form.height.value}`;
}

function tellLength() {
  const frames = Number(form.num_frames.value);
  $("length").textContent = `${frames} frames, ${(frames / Number(form.fps.value || 1)).toFixed(1)} s`;
}

function asked() {
  const body = { prompt: form.prompt.value.trim() };
  if (form.model.value) body.model = form.model.value;
  if (form.negative_prompt.value.trim()) body.negative_prompt = form.negative_prompt.value.trim();
  for (const name of ["width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale", "seed"]) {
    if (form[name].value !== "") body[name] = Number(form[name].value);
  }
  const loras = Object.entries(materials.chosen());
  if (loras.length) body.lora = loras.map(([name, strength]) => ({ name, strength }));
  const image = materials.image();
  if (!image) return { json: body };
  const parts = new FormData();
  for (const [name, value] of Object.entries(body)) if (name !== "lora") parts.append(name, value);
  for (const { name, strength } of body.lora ?? []) {
    parts.append("lora[][name]", name);
    parts.append("lora[][strength]", strength);
  }
  parts.append("input_reference", image);
  return { form: parts };
}

// A frame of the model's own area in the image's proportions: the less is cropped.
function frameLike([w, h]) {
  const unit = model.size_multiple;
  const side = Math.sqrt(model.width * model.height);
  const near = (pixels) => Math.max(Math.floor(pixels / unit + 0.5), 1) * unit;
  const [width, height] = [near(side * Math.sqrt(w / h)), near(side * Math.sqrt(h / w))];
  if (width * height > model.max_pixels) return;
  [form.width.value, form.height.value] = [width, height];
  tickShape();
}

async function roll() {
  if (!model || !form.reportValidity()) return;
  $("roll").disabled = true;
  refuse(null);
  try {
    const video = await (await call("/v1/videos", { method: "POST", ...asked() })).json();
    show(video);
    say("The clip is in the queue.");
  } catch (error) {
    refuse(error);
  } finally {
    $("roll").disabled = false;
  }
}

function refuse(error) {
  $("refusal").hidden = !error;
  $("refusal").textContent = error ? error.message : "";
  const field = error?.param === "size" ? form.width : form.elements.namedItem(error?.param ?? "");
  if (field instanceof HTMLElement) field.focus();
}

async function again(video) {
  materials.select(video.model);
  for (const name of ["prompt", "negative_prompt", "num_frames", "fps", "num_inference_steps", "guidance_scale", "seed"]) form[name].value = video[name];
  [form.width.value, form.height.value] = video.size.split("x");
  materials.choose(video.lora);
  form.dispatchEvent(new Event("input"));
  tickShape();
  form.prompt.focus();
  form.scrollIntoView({ block: "start", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  const picture = video.image && (await call(`/v1/videos/${video.id}/content?variant=start_image`).catch(() => null));
  await materials.setImage(picture && (await picture.blob()));
}

// --- the takes ---

const active = (video) => video.status === "queued" || video.status === "in_progress";

function show(video, { first = true } = {}) {
  let take = takes.get(video.id);
  if (!take) {
    take = { node: $("take").content.firstElementChild.cloneNode(true) };
    take.node.dataset.id = video.id;
    takes.set(video.id, take);
  }
  const was = take.video;
  take.video = video;
  fill(take);
  if (!was || active(was) !== active(video)) {
    const list = active(video) ? $("queue") : $("gallery");
    if (active(video) || !first) list.append(take.node);
    else list.prepend(take.node);
    if (was) say(video.status === "completed" ? `Finished: ${video.prompt}` : `Failed: ${video.error?.message}`);
  }
  $("empty").hidden = takes.size > 0;
  if (active(video) && !take.watching) watch(take);
}

function fill(take) {
  const { node, video } = take;
  const part = (name) => node.querySelector(`.${name}`);
  node.className = `take ${{ completed: "done", failed: "failed", queued: "waiting" }[video.status] ?? "going"}`;
  node.classList.toggle("filmed", part("picture").childElementCount > 0);
  part("text").textContent = video.prompt;
  part("state").textContent = stateOf(video);
  const facts = [video.size.replace("x", "×"), `${video.num_frames} frames`, `${video.num_inference_steps} steps`, `seed ${video.seed}`];
  facts.push(...Object.entries(video.lora).map(([name, strength]) => (strength === 1 ? name : `${name} ${strength}`)), ...(video.image ? ["from an image"] : []));
  part("facts").textContent = facts.map((fact) => fact.replaceAll(" ", "\u00a0")).join(" · ");
  const strip = part("strip");
  for (const [name, value] of [["--steps", video.num_inference_steps], ["--done", video.step], ["--gap", video.num_inference_steps > 60 ? "1px" : "2px"]]) strip.style.setProperty(name, value);
  strip.setAttribute("aria-valuemax", video.num_inference_steps);
  strip.setAttribute("aria-valuenow", video.step);
  strip.setAttribute("aria-label", "Denoising steps done");
  const shown = `${video.status} ${Boolean(take.busy)}`;
  if (take.shown === shown) return; // buttons keep the focus while the numbers change
  take.shown = shown;
  part("doings").replaceChildren(...doings(take));
  if (video.status === "completed") film(take);
}

function stateOf(video) {
  if (video.status === "failed") return video.error?.code === "cancelled" ? "cancelled" : `failed: ${video.error?.message}`;
  const left = video.eta_seconds > 1 ? `, ${duration(video.eta_seconds)} left` : "";
  if (video.status === "queued") {
    const before = video.queue_position;
    return `${before ? `waiting behind ${before} ${before === 1 ? "other" : "others"}` : "next in the queue"}${left}`;
  }
  const phase = PHASES[video.phase] ?? video.phase ?? "working";
  return (video.phase === "denoise" ? `step ${video.step} of ${video.num_inference_steps}` : phase) + left;
}

const duration = (seconds) => (seconds < 90 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`);

function doings(take) {
  const { video } = take;
  const button = (text, does) => {
    const made = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: text });
    made.addEventListener("click", does);
    return made;
  };
  if (active(video)) return [button("Cancel", () => end(take, `/v1/videos/${video.id}/cancel`, "POST"))];
  const made = [button("Again with this seed", () => again(video)), button("Delete", () => end(take, `/v1/videos/${video.id}`, "DELETE"))];
  if (video.status === "completed") made.unshift(button("Download", () => save(take)));
  return made;
}

async function end(take, path, method) {
  try {
    const told = await (await call(path, { method })).json();
    if (method === "POST") return show(told);
  } catch (error) {
    if (error.status !== 404) return say(error.message);
  }
  forget(take);
}

function forget({ node, video, url }) {
  if (url) URL.revokeObjectURL(url);
  node.remove();
  takes.delete(video.id);
  $("empty").hidden = takes.size > 0;
}

// With a key the browser's own requests would lack it: the bytes are fetched, and shown from here.
async function address(take, variant) {
  const path = `/v1/videos/${take.video.id}/content?variant=${variant}`;
  return key ? URL.createObjectURL(await (await call(path)).blob()) : path;
}

async function film(take) {
  const [width, height] = take.video.size.split("x").map(Number);
  const screen = Object.assign(document.createElement("video"), { tabIndex: 0, loop: true, muted: true, playsInline: true, preload: "metadata" });
  screen.setAttribute("aria-label", take.video.prompt);
  screen.style.aspectRatio = `${width} / ${Math.min(height, width * 1.25)}`;
  const picture = take.node.querySelector(".picture");
  const touch = () => {
    screen.controls = screen.matches(":hover, :focus"); // else they cover a small still
    picture.classList.toggle("still", screen.paused && !screen.controls);
  };
  for (const sign of ["pointerenter", "pointerleave", "focus", "blur", "play", "pause"]) screen.addEventListener(sign, touch);
  touch();
  picture.classList.toggle("small", width < 240);
  picture.replaceChildren(screen);
  screen.src = take.url = await address(take, "video").catch(() => "");
}

async function save(take) {
  const link = Object.assign(document.createElement("a"), { download: `${take.video.id}.mp4`, href: take.url || (await address(take, "video")) });
  link.click();
}

// --- what happens meanwhile ---

// A running job tells every step itself; one stream at a time, since a browser has few connections. Others are polled.
let streaming = null;

async function watch(take) {
  take.watching = true;
  const { id } = take.video;
  while (takes.has(id) && active(take.video)) {
    let pause = 1000;
    try {
      if (take.video.status === "in_progress" && !streaming) await stream(take).catch(() => {}); // polling goes on
      const answer = await call(`/v1/videos/${id}`);
      pause = Number(answer.headers.get("openai-poll-after-ms")) || 1000;
      show(await answer.json());
    } catch (error) {
      if (error.status === 404) return forget(take);
      if (error.status === 401) break;
    }
    if (document.hidden) pause = Math.max(pause, 5000);
    if (active(take.video)) await sleep(pause);
  }
  take.watching = false;
}

async function stream(take) {
  streaming = take.video.id;
  try {
    const answer = await call(`/v1/videos/${take.video.id}/events`);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (text + value).split("\n\n");
      text = events.pop();
      for (const event of events) heard(take, event);
      if (!takes.has(take.video.id)) return await reader.cancel();
    }
  } finally {
    streaming = null;
  }
}

function heard(take, text) {
  const line = (name) => text.match(new RegExp(`^${name}: (.*)$`, "m"))?.[1];
  const name = line("event");
  if (!name) return;
  const told = JSON.parse(line("data"));
  if (name === "preview") return preview(take, told);
  const phase = { step: "denoise" }[name] ?? name;
  const { step, eta_seconds } = told;
  if (["text", "step", "decode", "encode"].includes(name)) show({ ...take.video, status: "in_progress", phase, step, eta_seconds });
}

function preview(take, { image, type = "image/jpeg" }) {
  if (!image) return;
  const picture = take.node.querySelector(".picture");
  const shown = picture.querySelector("img") ?? Object.assign(document.createElement("img"), { alt: "Preview of the clip so far" });
  shown.src = image.startsWith("data:") ? image : `data:${type};base64,${image}`;
  if (!shown.isConnected) picture.replaceChildren(shown);
  take.node.classList.add("filmed");
}

async function load({ older = false } = {}) {
  const behind = older && oldest ? `&after=${oldest}` : "";
  const page = await (await call(`/v1/videos?limit=${PAGE}${behind}`)).json();
  const queued = page.data.filter(active).reverse(); // the queue runs from the oldest
  const ended = page.data.filter((video) => !active(video));
  const known = takes.size > 0 && !older;
  for (const video of queued) show(video);
  for (const video of known ? ended.reverse() : ended) show(video, { first: known });
  if (older || !oldest) {
    oldest = page.last_id;
    $("older").hidden = !page.has_more;
  }
  $("empty").hidden = takes.size > 0;
}

// Clips that others asked for appear too, those that are gone do not stay, and a worker that was starting is ready.
async function keepUp() {
  for (;;) {
    await sleep(document.hidden ? 60_000 : 15_000);
    await Promise.allSettled([look(), load()]);
  }
}

function say(text) {
  $("said").textContent = text;
}

// --- the key ---

function askForKey() {
  $("key-button").hidden = false;
  $("key-refusal").hidden = !key;
  $("key-refusal").textContent = "The server does not know this key.";
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

function takeKey() {
  key = $("key").value.trim();
  sessionStorage.setItem("key", key);
  if ($("key-keep").checked) localStorage.setItem("key", key);
  else localStorage.removeItem("key");
  start();
}

// --- the start ---

form.addEventListener("submit", (event) => {
  event.preventDefault();
  roll();
});
form.addEventListener("input", (event) => {
  if (event.target.name === "shape") [form.width.value, form.height.value] = event.target.value.split("x");
  tickShape();
  tellLength();
  if (model) sessionStorage.setItem("draft", JSON.stringify(Object.fromEntries(new FormData(form))));
});
$("input_reference").addEventListener("change", async () => {
  const size = await materials.preview();
  if (size) frameLike(size);
});
$("start-drop").addEventListener("click", () => {
  materials.setImage(null);
  $("input_reference").focus();
});
$("older").addEventListener("click", () => load({ older: true }));
$("key-button").addEventListener("click", askForKey);
$("key-dialog").querySelector("form").addEventListener("submit", takeKey);
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter") roll();
  const typing = event.target instanceof HTMLInputElement || event.target instanceof HTMLTextAreaElement;
  if (event.key !== "/" || typing) return;
  event.preventDefault();
  form.prompt.focus();
});
if (/Mac|iPhone|iPad/.test(navigator.platform)) $("shortcut").textContent = "⌘ ↵";

async function start() {
  await Promise.allSettled([meet(), load()]);
}
start();
keepUp();
