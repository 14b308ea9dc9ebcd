// Elements, without HTML in strings.

export const $ = (id) => document.getElementById(id);

// An element with attributes (`onclick` and the like are listeners) and children; what is null is left out.
export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) {
    if (attribute.startsWith("on")) element.addEventListener(attribute.slice(2), value);
    else if (value === true) element.setAttribute(attribute, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(attribute, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// Says something once: the same words again would not be read out, and would not be new.
export function say(element, words) {
  if (element.textContent !== words) element.textContent = words;
}

// Asks before something is lost. `question` and `yes` are words.
export function confirm(question, yes) {
  const dialog = $("confirm");
  $("confirm-text").textContent = question;
  $("confirm-yes").textContent = yes;
  return new Promise((resolve) => {
    $("confirm-yes").onclick = () => dialog.close("yes");
    $("confirm-no").onclick = () => dialog.close("");
    // The event comes late: it may be of a dialog that was asked again meanwhile.
    dialog.onclose = () => { if (!dialog.open) resolve(dialog.returnValue === "yes"); };
    dialog.returnValue = "";
    dialog.showModal();
  });
}
