/** The bundle that stands beside the page. */
export * from "../src/qcc";
