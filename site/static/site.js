// What is wider than the page scrolls within itself and can be reached by the keyboard.
const boxes = "pre, div.math, div.wide, div.cell_output, .pst-scrollable-table-container, mjx-container";

function wider(element) {
  return element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0;
}

function containLong(formula) {
  const room = formula.parentElement.closest("p, li, td, dd, h1, h2, h3");
  const long = room && formula.getBoundingClientRect().width > room.clientWidth;
  formula.classList.toggle("long", Boolean(long));
}

function reachScrolling() {
  document.querySelectorAll("mjx-container:not([display])").forEach(containLong);
  for (const box of document.querySelectorAll(boxes)) {
    const scrolls = wider(box) && /auto|scroll/.test(getComputedStyle(box).overflowX);
    if (scrolls && !box.hasAttribute("tabindex")) {
      box.setAttribute("tabindex", "0");
    }
  }
}

// Names and roles that the theme and the bibliography leave out.
function nameParts() {
  for (const part of document.querySelectorAll("nav summary:not([aria-label])")) {
    const entry = part.closest("li").querySelector("a");
    part.setAttribute("aria-label", `Pages of ${entry.textContent.trim()}`);
  }
  for (const entry of document.querySelectorAll("[role=doc-biblioentry]")) {
    entry.setAttribute("role", "listitem");
  }
}

window.addEventListener("load", () => {
  nameParts();
  const typeset = window.MathJax && MathJax.startup && MathJax.startup.promise;
  Promise.resolve(typeset).then(reachScrolling);
});
window.addEventListener("resize", reachScrolling);
