// Short ways to read and change the document.

export const $ = (id) => document.getElementById(id);

/** Makes an element; attributes that are properties of elements are set as such. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in made) made[key] = value; else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** Shows a text in the element, or hides the element when there is none. */
export function showText(id, words = '') {
  $(id).textContent = words;
  $(id).hidden = !words;
}
