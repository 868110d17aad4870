"use strict";
for (const element of document.querySelectorAll(".chart")) {
  const specification = JSON.parse(element.querySelector("script").textContent);
  // The interpreter (`ast`) evaluates expressions without eval, which the page's content security policy forbids.
  vegaEmbed(element, specification, {
    actions: false,
    ast: true,
    renderer: "svg",
    defaultStyle: false,
    tooltip: { disableDefaultStyle: true },
  });
  // A tap causes no pointermove, which shows tooltips, and ends with a pointerout, which hides them; a click comes last.
  element.addEventListener("click", (event) => {
    if (!matchMedia("(hover: none)").matches) return;
    const { clientX, clientY } = event;
    for (const type of ["pointerover", "pointermove"]) {
      event.target.dispatchEvent(new PointerEvent(type, { bubbles: true, clientX, clientY, pointerType: "touch" }));
    }
  });
}
for (const type of ["pointerdown", "scroll"]) {
  document.addEventListener(type, () => {
    if (matchMedia("(hover: none)").matches) {
      document.getElementById("vg-tooltip-element")?.classList.remove("visible");
    }
  });
}
