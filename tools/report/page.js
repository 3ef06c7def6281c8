"use strict";

document.documentElement.classList.add("js");
const list = document.getElementById("clips");
const tools = document.getElementById("tools");
const clips = [...document.querySelectorAll(".clip")].map((element) => ({
  element,
  places: JSON.parse(element.dataset.places),
  source: element.dataset.source,
  text: [...element.querySelectorAll(".reference, .caption, .key")].map((each) => each.textContent).join(" ").toLowerCase(),
}));
let order = clips;

// Sorting, filtering, searching.

function sort() {
  const score = tools.elements.score.value;
  const way = tools.elements.order.value === "worst" ? 1 : -1;
  const place = (clip) => (score in clip.places ? way * clip.places[score] : Infinity);
  order = [...clips].sort((a, b) => place(a) - place(b) || 0);
  list.prepend(...order.map((clip) => clip.element));
  for (const row of list.querySelectorAll("[data-score]")) {
    row.classList.toggle("sorted", row.dataset.score === score);
  }
}

function filter() {
  const source = tools.elements.source.value;
  const words = tools.elements.search.value.toLowerCase().split(/\s+/);
  let shown = 0;
  for (const clip of clips) {
    const wanted = (!source || clip.source === source) && words.every((word) => clip.text.includes(word));
    clip.element.hidden = !wanted;
    if (!wanted) clip.element.querySelector("audio")?.pause();
    shown += wanted;
  }
  tools.elements.count.value = `${shown} of ${clips.length}`;
  document.getElementById("none").hidden = shown > 0;
}

// Playing: one clip at a time.

function toggle(clip) {
  const audio = clip.querySelector("audio");
  if (audio) audio.paused ? audio.play() : audio.pause();
}

function length(clip) {
  const { duration } = clip.querySelector("audio");
  return Number.isFinite(duration) ? duration : Number(clip.querySelector(".mel").dataset.seconds);
}

function seek(clip, seconds) {
  const audio = clip.querySelector("audio");
  if (!audio) return;
  audio.currentTime = Math.min(Math.max(0, seconds), length(clip));
  follow(clip);
}

function follow(clip) {
  const audio = clip.querySelector("audio");
  clip.classList.add("played");
  clip.style.setProperty("--at", Math.min(1, audio.currentTime / length(clip)));
  if (!audio.paused) requestAnimationFrame(() => follow(clip));
}

function wire(clip) {
  const audio = clip.querySelector("audio");
  const button = clip.querySelector(".play");
  const name = button.getAttribute("aria-label").replace(/^Play /, "");
  button.hidden = false;
  button.addEventListener("click", () => toggle(clip));
  clip.querySelector(".mel").addEventListener("click", (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    seek(clip, ((event.clientX - box.left) / box.width) * length(clip));
    audio.play();
  });
  audio.addEventListener("play", () => {
    for (const other of list.querySelectorAll(".playing audio")) if (other !== audio) other.pause();
    clip.classList.add("playing");
    button.setAttribute("aria-label", `Pause ${name}`);
    follow(clip);
  });
  audio.addEventListener("pause", () => {
    clip.classList.remove("playing");
    button.setAttribute("aria-label", `Play ${name}`);
  });
  audio.addEventListener("ended", () => clip.classList.remove("played"));
}

// Keys.

function go(clip, way) {
  const shown = order.map((each) => each.element).filter((element) => !element.hidden);
  const next = clip ? shown[shown.indexOf(clip) + way] : shown[0];
  if (!next) return;
  const playing = clip?.classList.contains("playing");
  if (playing) clip.querySelector("audio").pause();
  next.focus({ preventScroll: true });
  next.scrollIntoView({ block: "nearest" });
  if (playing) toggle(next);
}

function press(event) {
  const clip = event.target.closest(".clip");
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const actions = {
    ArrowDown: () => go(clip, 1),
    ArrowUp: () => go(clip, -1),
    ArrowRight: () => seek(clip, clip.querySelector("audio")?.currentTime + 1),
    ArrowLeft: () => seek(clip, clip.querySelector("audio")?.currentTime - 1),
  };
  if (event.target === clip) actions[" "] = () => toggle(clip);
  if (!(event.key in actions)) return;
  event.preventDefault();
  actions[event.key]();
}

function arrive() {
  const clip = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!clip?.classList.contains("clip")) return;
  if (clip.hidden) {
    tools.reset();
    sort();
    filter();
  }
  clip.focus({ preventScroll: true });
  clip.scrollIntoView({ block: "start" });
}

if (list) {
  list.querySelectorAll(".clip:has(audio)").forEach(wire);
  list.addEventListener("keydown", press);
  tools.addEventListener("input", (event) => {
    if (event.target.matches("select")) sort();
    filter();
  });
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.elements.search.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "Enter") {
      event.preventDefault();
      go(null, 0);
    }
  });
  sort();
  filter();
  arrive();
  addEventListener("hashchange", arrive);
}
