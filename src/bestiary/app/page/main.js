// Starts the page and connects its buttons and fields.
import { checkSubject, connectAnimals } from './animals.js';
import { adapterChanged, catalog, checkSize, fillChoices, loadCatalog, showWeights } from './catalog.js';
import { axisChanged } from './comparing.js';
import { COLOURS } from './colours.js';
import { $, showText, showTextsAgain } from './dom.js';
import { cancel, draw, isDrawing } from './drawing.js';
import { connectDropping } from './dropping.js';
import { entryAt, translateCards } from './gallery.js';
import { switchLanguage, translateDocument } from './language.js';
import { repeatOrder } from './order.js';
import { chooseStart } from './start.js';
import { applyColours, resetColours, saveShownGrid, show, showAgain, shown } from './stage.js';
import { chosenFile, uploadAdapter, uploadStart } from './upload.js';

function changeLanguage() {
  switchLanguage();
  translateDocument();
  if (catalog) {
    fillChoices();
    chooseAnotherAdapter();
    translateCards();
  }
  showTextsAgain();
  if (!isDrawing()) showAgain();
}

function chooseAnotherAdapter() {
  adapterChanged();
  checkSubject();
}

async function openEntry(event) {
  const entry = entryAt(event.target);
  if (!entry || isDrawing()) return;
  await show(entry);
  $('stage').scrollIntoView({ behavior: 'smooth', block: 'nearest' });
}

connectAnimals();
$('order').addEventListener('submit', (event) => {
  event.preventDefault();
  draw();
});
$('cancel').addEventListener('click', cancel);
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && !event.isComposing) cancel();
});
$('language').addEventListener('click', changeLanguage);
for (const id of ['adapter', 'second']) $(id).addEventListener('change', chooseAnotherAdapter);
$('resolution').addEventListener('change', checkSize);
for (const id of ['weight', 'second', 'second-weight', 'denoise']) $(id).addEventListener('input', showWeights);
for (const [id, upload] of [['upload', uploadAdapter], ['image', uploadStart]]) {
  $(id).addEventListener('change', async () => {
    const file = chosenFile(id);
    if (!file) return;
    await upload(file);
    checkSubject();
  });
  $(`${id}-label`).addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' && event.key !== ' ') return;
    event.preventDefault();
    $(id).click();
  });
}
$('image-clear').addEventListener('click', () => chooseStart(''));
connectDropping(() => {
  checkSubject();
  checkSize();
});
$('seed').addEventListener('input', () => { $('random').checked = false; });
for (const colour of COLOURS) $(colour).addEventListener('input', applyColours);
$('reset').addEventListener('click', resetColours);
$('reuse').addEventListener('click', () => {
  repeatOrder(shown.order);
  checkSubject();
  checkSize();
});
$('axis').addEventListener('change', axisChanged);
$('save-grid').addEventListener('click', saveShownGrid);
$('gallery').addEventListener('click', openEntry);

translateDocument();
try {
  await loadCatalog();
  checkSubject();
  document.body.classList.add('ready');
} catch (error) {
  showText('message', error.words);
}
