// The list of animals below their field: a combobox for mouse, touch and keyboard.
import { catalog } from './catalog.js';
import { $, element } from './dom.js';
import { language, text } from './language.js';

const list = $('animals');

export function closeList() {
  list.hidden = true;
  $('animal').setAttribute('aria-expanded', 'false');
  $('animal').removeAttribute('aria-activedescendant');
}

function openList(everything = false) {
  if (!catalog) return;
  const found = matches(everything ? '' : $('animal').value);
  list.replaceChildren(...found.map((animal, number) => {
    const [first, second] = language === 'zh' ? [animal.chinese, animal.name] : [animal.name, animal.chinese];
    return element('li', { role: 'option', id: `animal-${number}`, 'data-name': first, 'aria-selected': 'false' },
      element('span', { textContent: first }), element('span', { className: 'other', textContent: second }));
  }));
  if (!found.length) list.replaceChildren(element('li', { className: 'nothing', textContent: text('nothing') }));
  list.hidden = false;
  $('animal').setAttribute('aria-expanded', 'true');
  $('animal').removeAttribute('aria-activedescendant');
}

/** The animals with the text in one of their names; those whose name begins with it come first. */
function matches(wanted) {
  const word = wanted.trim().toLowerCase();
  const some = (animal, test) => [animal.name, animal.chinese, animal.folder].some(test);
  const begin = catalog.animals.filter((animal) => some(animal, (name) => name.startsWith(word)));
  const contain = catalog.animals.filter((animal) => some(animal, (name) => name.includes(word)));
  return [...new Set([...begin, ...contain])];
}

function move(by) {
  const options = [...list.querySelectorAll('[role=option]')];
  if (!options.length) return;
  const active = options.indexOf(activeOption());
  const next = active < 0 ? (by > 0 ? 0 : options.length - 1) : (active + by + options.length) % options.length;
  options.forEach((option, number) => option.setAttribute('aria-selected', String(number === next)));
  options[next].scrollIntoView({ block: 'nearest' });
  $('animal').setAttribute('aria-activedescendant', options[next].id);
}

function activeOption() {
  return list.querySelector('[aria-selected=true]');
}

function choose(option) {
  $('animal').value = option.dataset.name;
  closeList();
}

function pressed(event) {
  if (event.isComposing) return; // Enter confirms the input method's word
  if (event.key === 'ArrowDown' || event.key === 'ArrowUp') {
    if (list.hidden) openList(true);
    move(event.key === 'ArrowDown' ? 1 : -1);
    event.preventDefault();
  } else if (event.key === 'Enter' && !list.hidden && activeOption()) {
    choose(activeOption());
    event.preventDefault();
  } else if (event.key === 'Escape' && !list.hidden) {
    closeList();
    event.stopPropagation(); // Escape also cancels a drawing
  }
}

export function connectAnimals() {
  $('animal').addEventListener('input', () => openList());
  $('animal').addEventListener('click', () => openList(true));
  $('animal').addEventListener('blur', closeList);
  $('animal').addEventListener('keydown', pressed);
  list.addEventListener('mousedown', (event) => event.preventDefault()); // keeps the focus in the field
  list.addEventListener('click', (event) => {
    const option = event.target.closest('[role=option]');
    if (option) choose(option);
  });
}
