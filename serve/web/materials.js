// What a clip is made from besides words: the model, where there are several, a start image, where it takes one, and
// LoRAs, where there are any.

const $ = (id) => document.getElementById(id);
const input = $("input_reference");
const styles = $("loras").querySelector("ul");
const NOTES = {
  optional: "PNG, JPEG or WebP; cropped around its middle to the frame. Without one the words decide.",
  required: "PNG, JPEG or WebP; cropped around its middle to the frame. This model needs one.",
};

let change = () => {};

// Offers the models, and calls `prepare` with the chosen one, now and whenever it is another.
export function list(served, prepare) {
  const choice = $("served");
  const draft = JSON.parse(sessionStorage.getItem("draft") || "{}").model;
  $("which").hidden = served.length < 2;
  choice.replaceChildren(...served.map(({ id }) => Object.assign(document.createElement("option"), { value: id, textContent: id })));
  choice.value = served.some(({ id }) => id === draft) ? draft : served[0].id;
  const chosen = (fresh) => prepare(served.find(({ id }) => id === choice.value), fresh);
  change = () => chosen(true);
  choice.onchange = change;
  chosen(false);
}

// The model of an earlier clip, if it is still there.
export function select(name) {
  const choice = $("served");
  if (choice.value === name || ![...choice.options].some(({ value }) => value === name)) return;
  choice.value = name;
  change();
}

export function offer(model, loras) {
  $("start").hidden = model.takes_image === "none";
  input.required = model.takes_image === "required";
  $("start-note").textContent = NOTES[model.takes_image] ?? "";
  $("loras").hidden = loras.length === 0;
  const held = chosen();
  styles.replaceChildren(...loras.map(({ name }) => row(name, held[name])));
}

function row(name, strength) {
  const item = document.createElement("li");
  const label = document.createElement("label");
  const box = Object.assign(document.createElement("input"), { type: "checkbox", value: name, checked: strength !== undefined });
  const text = Object.assign(document.createElement("span"), { textContent: name });
  label.append(box, text);
  const amount = Object.assign(document.createElement("input"), { type: "number", min: -4, max: 4, step: "any", value: strength ?? 1, disabled: !box.checked, className: "data" });
  amount.setAttribute("aria-label", `Strength of ${name}`);
  box.addEventListener("change", () => {
    amount.disabled = !box.checked;
  });
  item.append(label, amount);
  return item;
}

// {name: strength} of those that are ticked.
export function chosen() {
  const ticked = [...styles.children].filter((item) => item.querySelector("[type=checkbox]").checked);
  return Object.fromEntries(ticked.map((item) => [item.querySelector("[type=checkbox]").value, Number(item.querySelector("[type=number]").value)]));
}

export function choose(strengths) {
  for (const item of styles.children) {
    const [box, amount] = item.querySelectorAll("input");
    box.checked = box.value in strengths;
    amount.disabled = !box.checked;
    if (box.checked) amount.value = strengths[box.value];
  }
}

export const image = () => ($("start").hidden ? null : (input.files[0] ?? null));

// The image of an earlier clip, as the server keeps it; null clears the field.
export function setImage(blob) {
  const files = new DataTransfer();
  if (blob) files.items.add(new File([blob], "start.png", { type: blob.type }));
  input.files = files.files;
  return preview();
}

// Shows the chosen image, and tells its size in pixels, or null for what is none.
export async function preview() {
  const picture = $("start-picture");
  const file = image();
  $("start-drop").hidden = !file || input.required;
  picture.hidden = true;
  if (!file) return null;
  picture.src = await new Promise((done) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => done(reader.result));
    reader.readAsDataURL(file);
  });
  try {
    await picture.decode();
  } catch {
    return null; // the server will say what is wrong with it
  }
  picture.hidden = false;
  return [picture.naturalWidth, picture.naturalHeight];
}
