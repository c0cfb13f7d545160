// Copying, and details opened for paper. All else works without a script.
"use strict";
(() => {
  const status = document.getElementById("status");
  const say = (text) => { status.textContent = text; setTimeout(() => { status.textContent = ""; }, 2500); };

  const byHand = (text) => {  // where the clipboard is not to be had: a selection that is copied, or that the reader copies
    const area = document.createElement("textarea");
    area.value = text;
    area.setAttribute("aria-label", "Text to copy");
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  };

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button[data-copy]");
    if (!button) return;
    const text = button.dataset.copy;
    let done = true;
    try { await navigator.clipboard.writeText(text); } catch { done = byHand(text); }
    button.focus();
    say(done ? "Copied" : "This browser does not let a page copy");
  });

  addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });
})();
