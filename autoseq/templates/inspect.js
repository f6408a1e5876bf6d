// Shows the details of the block that is pointed at or focused; a click keeps them. Nothing is fetched, and no text becomes markup.
"use strict";
(() => {
  const root = document.documentElement;
  const panel = document.getElementById("details");
  const holders = ".row, summary";
  let kept = null;

  const show = (holder) => {
    const detail = holder.querySelector(":scope > .detail");
    if (!detail) return;
    const copy = detail.cloneNode(true);
    copy.hidden = false;
    panel.replaceChildren(copy);
    document.querySelectorAll(".shown").forEach((each) => each.classList.remove("shown"));
    holder.classList.add("shown");
  };
  const keep = (holder) => {
    if (kept) kept.classList.remove("kept");
    kept = kept === holder ? null : holder;
    if (kept) kept.classList.add("kept");
  };

  root.classList.add("scripted");
  document.querySelectorAll(holders).forEach((holder) => {
    holder.addEventListener("pointerenter", () => { if (!kept) show(holder); });
    holder.addEventListener("focus", () => { if (!kept) show(holder); });
    holder.addEventListener("click", () => {
      if (holder.matches(".row")) keep(holder);
      if (kept === holder || !kept) show(holder);
    });
    holder.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && holder.matches(".row")) { keep(holder); show(holder); }
    });
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && kept) keep(kept);
  });

  const themes = ["system", "light", "dark"];
  const button = document.getElementById("theme");
  const set = (theme) => {
    if (theme === "system") root.removeAttribute("data-theme"); else root.setAttribute("data-theme", theme);
    button.textContent = "Theme: " + theme;
  };
  let theme = themes.includes(location.hash.slice(1)) ? location.hash.slice(1) : "system";
  set(theme);
  button.hidden = false;
  button.addEventListener("click", () => { theme = themes[(themes.indexOf(theme) + 1) % themes.length]; set(theme); });

  const first = document.querySelector(".row.attention") || document.querySelector(holders);
  if (first) show(first);
})();
