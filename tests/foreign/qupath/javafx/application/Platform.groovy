package javafx.application

/** Stands for JavaFX: runs at once. */
class Platform {
    static void runLater(Runnable task) { task.run() }
}
