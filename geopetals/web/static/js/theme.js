// Light or dark: the system's choice until a person makes one.

import { get } from "./dom.js";

const KEPT = "geopetals-theme";
const system = matchMedia("(prefers-color-scheme: dark)");

export function startTheme() {
  const apply = () => {
    const dark = (localStorage.getItem(KEPT) || (system.matches ? "dark" : "light")) === "dark";
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    get("theme").setAttribute("aria-pressed", String(dark));
  };
  system.addEventListener("change", apply);
  get("theme").addEventListener("click", () => {
    localStorage.setItem(KEPT, document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    apply();
  });
  apply();
}
