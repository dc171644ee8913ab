// Text in PNG files.

const END_OF_HEADER = 8 + 25; // bytes: the signature and the IHDR chunk

/** The PNG with an international text chunk after its header (PNG specification, 11.3.3). */
export function withText(png, keyword, words) {
  const chunk = new TextEncoder().encode(`iTXt${keyword}\0\0\0\0\0${words}`);
  const parts = [png.slice(0, END_OF_HEADER), uint32(chunk.length - 4), chunk, uint32(crc32(chunk)), png.slice(END_OF_HEADER)];
  return new Blob(parts, { type: 'image/png' });
}

/** The text that a PNG holds under a keyword, in a tEXt chunk or an uncompressed iTXt chunk; undefined for none. */
export function textIn(buffer, keyword) {
  const view = new DataView(buffer);
  const ascii = (start, end) => new TextDecoder('latin1').decode(buffer.slice(start, end));
  if (ascii(1, 4) !== 'PNG') return undefined;
  for (let start = 8; start + 12 <= buffer.byteLength;) {
    const end = start + 8 + view.getUint32(start);
    const kind = ascii(start + 4, start + 8);
    const content = start + 8 + keyword.length + 1;
    if (['tEXt', 'iTXt'].includes(kind) && ascii(start + 8, content) === `${keyword}\0`) {
      if (kind === 'tEXt') return ascii(content, end);
      const words = new Uint8Array(buffer, content + 2, end - content - 2); // after the compression's flag and method
      const language = words.indexOf(0);
      return new TextDecoder().decode(words.subarray(words.indexOf(0, language + 1) + 1));
    }
    start = end + 4;
  }
  return undefined;
}

function uint32(value) {
  const bytes = new DataView(new ArrayBuffer(4));
  bytes.setUint32(0, value);
  return bytes;
}

function crc32(bytes) {
  let crc = -1;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}
