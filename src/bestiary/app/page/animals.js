// The list of animals below their field: a combobox for mouse, touch and keyboard.
import { catalog, chosenOffer } from './catalog.js';
import { $, element, showText } from './dom.js';
import { language, text } from './language.js';

const list = $('animals');

/** The names of the subjects that the chosen adapter was taught; null where nobody knows. */
function taught() {
  return chosenOffer()?.subjects ?? null;
}

export function closeList() {
  list.hidden = true;
  $('animal').setAttribute('aria-expanded', 'false');
  $('animal').removeAttribute('aria-activedescendant');
}

function openList(everything = false) {
  if (!catalog) return;
  const known = taught() && new Set(taught().map(({ folder }) => folder));
  const found = matches(everything ? '' : $('animal').value);
  list.replaceChildren(...found.map((animal, number) => {
    const [first, second] = namesOf(animal);
    const marks = [...(second === first ? [] : [second]), ...(known && !known.has(animal.folder) ? [text('notTaught')] : [])];
    return element('li', { role: 'option', id: `animal-${number}`, 'data-name': first, 'aria-selected': 'false' },
      element('span', { textContent: first }), element('span', { className: 'other', textContent: marks.join(' · ') }));
  }));
  if (!found.length) list.replaceChildren(element('li', { className: 'nothing', textContent: text('nothing') }));
  list.hidden = false;
  list.scrollTop = 0;
  $('animal').setAttribute('aria-expanded', 'true');
  $('animal').removeAttribute('aria-activedescendant');
}

function namesOf({ name, chinese }) {
  return language === 'zh' ? [chinese, name] : [name, chinese];
}

/** The subjects with the text in a name: first those that the adapter was taught, of each those that begin with it. */
function matches(wanted) {
  const word = wanted.trim().toLowerCase();
  const isTaught = new Set((taught() ?? []).map(({ folder }) => folder));
  const others = catalog.animals.filter(({ folder }) => !isTaught.has(folder));
  return [taught() ?? [], others].flatMap((subjects) => {
    const some = (test) => subjects.filter(({ name, chinese, folder }) => [name, chinese, folder].some((each) => test(each.toLowerCase())));
    return [...new Set([...some((name) => name.startsWith(word)), ...some((name) => name.includes(word))])];
  });
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
  checkSubject();
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

/**
 * Says what the subject's field stands for: nothing while there is a prompt, or something that was not taught. While
 * somebody types, the beginning of a taught name is enough. Leaving the field changes nothing, or the click that left it
 * would miss what it was meant for.
 */
export function checkSubject({ typing = false } = {}) {
  const prompt = $('prompt').value.trim();
  const name = $('animal').value.trim();
  $('prompt-wins').hidden = !prompt;
  $('prompt-text').textContent = prompt;
  $('animal').classList.toggle('unused', Boolean(prompt));
  const isUnknown = !prompt && name && taught() && !taught().some((subject) => isNamed(subject, name, typing));
  const adapter = chosenOffer()?.label;
  showText('untaught', isUnknown ? () => text('untaught', { name, adapter }) : null);
  const examples = taught()?.slice(0, 2).map((subject) => namesOf(subject)[0]);
  $('animal').placeholder = examples?.length ? text('taughtHint', { names: examples.join(text('comma')) }) : text('animalHint');
}

function isNamed({ folder, name, chinese }, typed, beginning) {
  const words = (each) => each.toLowerCase().replace(/[_\-\s]+/g, ' ').trim();
  const wanted = words(typed).replace(/^(an?|the) /, '');
  return [folder, name, chinese].some((each) => (beginning ? words(each).startsWith(wanted) : words(each) === wanted));
}

export function connectAnimals() {
  $('animal').addEventListener('input', () => {
    openList();
    checkSubject({ typing: true });
  });
  $('animal').addEventListener('click', () => openList(true));
  $('animal').addEventListener('blur', closeList);
  $('animal').addEventListener('keydown', pressed);
  $('prompt').addEventListener('input', () => checkSubject());
  $('prompt-clear').addEventListener('click', () => {
    $('prompt').value = '';
    checkSubject();
    $('animal').focus();
  });
  list.addEventListener('mousedown', (event) => event.preventDefault()); // keeps the focus in the field
  list.addEventListener('click', (event) => {
    const option = event.target.closest('[role=option]');
    if (option) choose(option);
  });
}
