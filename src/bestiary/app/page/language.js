// The language of the page, and texts in it.
import { $ } from './dom.js';
import { TEXTS } from './texts.js';

const browserLanguages = navigator.languages ?? [navigator.language];

export let language = localStorage.getItem('language')
  ?? (browserLanguages.find((tag) => /^(zh|en)/i.test(tag)) ?? 'en').slice(0, 2).toLowerCase();

export function switchLanguage() {
  language = language === 'en' ? 'zh' : 'en';
  localStorage.setItem('language', language);
}

export function hasText(key) {
  return Object.hasOwn(TEXTS[language], key);
}

export function text(key, values = {}) {
  return TEXTS[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

export function duration(seconds) {
  return seconds < 90 ? text('seconds', { n: Math.max(1, Math.round(seconds)) }) : text('minutes', { n: Math.round(seconds / 60) });
}

/** Fills in the texts that index.html names. */
export function translateDocument() {
  document.documentElement.lang = language === 'zh' ? 'zh-CN' : 'en';
  for (const node of document.querySelectorAll('[data-text]')) node.textContent = text(node.dataset.text);
  for (const node of document.querySelectorAll('[data-placeholder]')) node.placeholder = text(node.dataset.placeholder);
  $('language').textContent = text('otherLanguage');
}
