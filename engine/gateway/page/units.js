// Numbers as people read them.

export const whole = (value) => Math.round(value).toLocaleString("en");
export const rate = (value) => (value && value < 9.95 ? value.toFixed(1) : whole(value));
export const percent = (value) => `${value && value < 0.0095 ? (100 * value).toFixed(1) : Math.round(100 * value)}%`;

export function duration(seconds) {
  if (seconds < 0.00995) return `${(1000 * seconds).toFixed(1)} ms`;
  if (seconds < 0.9995) return `${Math.round(1000 * seconds)} ms`;
  return `${seconds < 9.95 ? seconds.toFixed(1) : whole(seconds)} s`;
}

export function uptime(seconds) {
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const [size, unit] = units.find(([size]) => seconds >= size) ?? units.at(-1);
  return `${Math.floor(seconds / size)} ${unit}`;
}
