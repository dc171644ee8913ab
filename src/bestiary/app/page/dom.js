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

const shownTexts = new Map(); // by the element's id: a function that gives its words

/** Shows what `words()` returns in the element, in the language of the moment. Hides the element without `words`. */
export function showText(id, words = null) {
  if (words) shownTexts.set(id, words); else shownTexts.delete(id);
  $(id).textContent = words ? words() : '';
  $(id).hidden = !words;
}

/** Words every shown text again, after the language has changed. */
export function showTextsAgain() {
  for (const [id, words] of shownTexts) $(id).textContent = words();
}
