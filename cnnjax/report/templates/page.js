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
}
